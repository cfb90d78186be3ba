"""Work ends as it would have, whoever has stopped to read what it prints."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

WORK = """
import subprocess, sys
from pathlib import Path
from rlhf_ray.observability.lasting_output import keep_output
from rlhf_ray.observability.progress import Progress

keep_output()
keep_output()
progress = Progress(["sft"])
with progress.stage("sft", 300) as bar:
    for _ in range(300):
        bar.advance(1, loss=1.0)
        progress.say("x" * 500)
        print("y" * 500)
        print("z" * 500, file=sys.stderr)
subprocess.run([sys.executable, "-c", "print('of a child', flush=True)"], check=False)
Path(sys.argv[1]).write_text("finished")
"""


def work(done: Path, **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WORK, str(done)], **streams)


@pytest.fixture
def done(tmp_path: Path) -> Path:
    return tmp_path / "done"


def test_a_pipe_that_is_closed_ends_nothing(done: Path) -> None:
    process = work(done, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    assert process.stdout.readline() == b"[1/1] sft\n"
    process.stdout.close()
    assert process.wait(60) == 0
    assert done.read_text() == "finished"


def test_a_terminal_that_is_closed_ends_nothing(done: Path) -> None:
    ours, its = pty.openpty()
    process = work(done, stdout=its, stderr=its)
    os.close(its)
    assert os.read(ours, 10)
    os.close(ours)
    assert process.wait(60) == 0
    assert done.read_text() == "finished"


@pytest.mark.parametrize("redirection", [">/dev/full", "2>/dev/full", ">&-", "2>&-", ">&- 2>&-"])
def test_a_full_disk_or_no_stream_at_all_ends_nothing(done: Path, redirection: str) -> None:
    shell = f'exec "$0" -c "$1" "$2" {redirection}'
    arguments = ["bash", "-c", shell, sys.executable, WORK, str(done)]
    assert subprocess.run(arguments, check=False, capture_output=True, timeout=60).returncode == 0
    assert done.read_text() == "finished"


def test_what_is_read_is_written(done: Path) -> None:
    process = work(done, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    printed = process.communicate(timeout=60)[0].decode().splitlines()
    assert printed.count("x" * 500) == printed.count("y" * 500) == 300
    assert printed[-1] == "of a child"


def test_a_stage_whose_reader_has_left_finishes(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    inline = "cluster: {mode: inline}\nrollout: {engine: transformers}\n"
    config.write_text(f"{inline}run: {{dir: {tmp_path}/run}}\n")
    main = "from rlhf_ray.cli import main; main()"
    overrides = ["prepare", str(config), "prepare.num_questions=60"]
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [sys.executable, "-c", main, *overrides], stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["status"]["state"] == "finished"


def test_what_a_library_prints_shows_no_secret() -> None:
    prints = """
import logging, sys
from rlhf_ray.observability.lasting_output import keep_output
keep_output()
print("token planted-s3cret-1 was refused")
logging.basicConfig()
logging.warning("again planted-s3cret-1")
print(f"written {sys.stdout.write('planted-s3cret-1')}")
"""
    environment = {**os.environ, "HF_TOKEN": "planted-s3cret-1"}
    done = subprocess.run(
        [sys.executable, "-c", prints], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "token ... was refused\n...written 16\n"
    assert done.stderr == "WARNING:root:again ...\n"
