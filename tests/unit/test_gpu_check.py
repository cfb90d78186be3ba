"""The GPU check as far as it needs no GPU: time limits, results that survive, the command line."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest
from gpu_checks.__main__ import main
from gpu_checks.cases import ONE_NODE, SEVERAL_NODES, Case
from gpu_checks.lines import FAIL, PASS, WOULD, Line
from gpu_checks.running import run

ROOT = Path(__file__).parents[2]
CASES = """
import os, pathlib, subprocess, time
from gpu_checks.lines import checked

def good(place, size):
    yield checked("it holds", True, size=size)

def slow(place):
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    yield checked("the first part holds", True, pid=child.pid)
    time.sleep(300)

def raises(place):
    yield checked("the first part holds", True)
    raise ValueError("no such kernel")

def dies(place):
    os._exit(3)
    yield
"""


@pytest.fixture(autouse=True)
def made_up_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up.py").write_text(CASES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def made_up(name: str, *arguments: int, **more: Any) -> Case:
    return Case("1", name, f"made_up:{name}", arguments, **more)


def is_running(pid: int) -> bool:
    """Return whether a process still does anything; where nobody waits for it, its entry stays."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_case_over_its_time_limit_fails_keeps_its_lines_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpu_checks.running.ENDS_S", 1)  # where SIGINT is ignored
    started = time.monotonic()
    first, late = run([made_up("slow", limit_s=8)], tmp_path, limit_s=600)
    assert (first.verdict, first.what) == (PASS, "the first part holds")
    assert (late.verdict, late.what) == (FAIL, "over its time limit of 8 s")
    assert time.monotonic() - started < 60
    assert not is_running(int(first.numbers["pid"] or 0))


def test_a_case_that_raises_or_dies_fails_and_the_next_one_runs(tmp_path: Path) -> None:
    cases = [made_up("raises"), made_up("dies"), made_up("good", 7)]
    lines = sorted(run(cases, tmp_path, limit_s=600), key=lambda line: (line.case, line.verdict))
    assert [(line.case, line.verdict, line.what) for line in lines] == [
        ("dies", FAIL, "ended with code 3"),
        ("good", PASS, "it holds"),
        ("raises", FAIL, "ended with an error"),
        ("raises", PASS, "the first part holds"),
    ]
    assert lines[1].numbers == {"size": 7}
    assert lines[2].numbers == {"error": "ValueError: no such kernel"}


def test_what_the_whole_time_leaves_out_is_named(tmp_path: Path) -> None:
    (line,) = run([made_up("good", 1)], tmp_path, limit_s=0)
    assert line.verdict == FAIL
    assert "the 0 s of the whole check are over" in line.what


def test_a_case_for_gpus_says_what_it_would_do(tmp_path: Path) -> None:
    (line,) = run([made_up("dies", does="wake an engine")], tmp_path, limit_s=600)
    assert str(line).split() == ["WOULD", "1", "dies", "wake", "an", "engine"]


def test_versions_are_read_here_and_results_are_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path), "--steps", "1"]) == 0
    whole = json.loads((tmp_path / "results.json").read_text())
    lines = [Line(**line) for line in whole["lines"]]
    assert [line.verdict for line in lines] == [PASS, WOULD]
    assert lines[0].numbers["ray"]
    assert [str(line) for line in lines] == capsys.readouterr().out.splitlines()[:2]


def test_a_step_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), "--steps", "9"]) == 2


@pytest.mark.parametrize("table", [ONE_NODE, SEVERAL_NODES], ids=["one node", "several"])
def test_steps_stand_in_order_and_lead_somewhere(table: dict[str, Case]) -> None:
    steps = [case.step for case in table.values()]
    assert steps == sorted(steps)
    assert set(steps) == {str(number) for number in range(1, len(set(steps)) + 1)}
    for case in table.values():
        module, _, function = case.function.partition(":")
        text = ROOT.joinpath("scripts", *module.split(".")).with_suffix(".py").read_text()
        assert f"def {function}(place: Place" in text


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts" / "gpu_check.sh", *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_script_installs_a_folder_of_wheels_without_a_network(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    refused = script("--wheels", wheels, "--out", tmp_path / "out")
    assert (refused.returncode, refused.stderr) == (2, f"gpu_check: {wheels} holds no wheels\n")
    info = "brought-1.0.dist-info"
    with zipfile.ZipFile(wheels / "brought-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("brought.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for _ in range(2):  # the second call finds it installed
        refused = script("--wheels", wheels, "--out", tmp_path / "out", "--steps", "9")
        assert (refused.returncode, refused.stderr) == (2, "gpu_check: no such step: 9\n")
        assert (tmp_path / "out" / "site" / "brought.py").is_file()
