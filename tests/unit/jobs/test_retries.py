"""A driver that dies is started again by its parent, unless its end was meant or would repeat."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlhf_ray.errors import DivergenceError, LedgerError, RlhfError
from rlhf_ray.jobs import retries
from rlhf_ray.jobs.retries import run_with_retries
from rlhf_ray.runs.control import ControlFiles, reporting_status

DRIVER = """
import os, signal, sys
folder, *codes = sys.argv[1:]
codes = [code for code in codes if not code.startswith("run.")]
with open(f"{folder}/starts", "a+") as starts:
    starts.write(" ".join(sys.argv[2 + len(codes):]) + ".")
    starts.seek(0)
    code = int(codes[starts.read().count("\\n")])
    starts.write("\\n")
if code < 0:
    if code == -signal.SIGINT:  # else ignored where the tests run in a shell's background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
"""Ends its nth start with the nth of the codes; writes its overrides."""


class Supervised:
    """A run whose driver ends as told, and the waits between its starts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.waits: list[float] = []
        self.said: list[str] = []
        monkeypatch.setattr(retries.time, "sleep", self.waits.append)

    def run(self, *codes: int, num_retries: int = 3) -> int:
        command = [sys.executable, "-c", DRIVER, str(self.folder), *map(str, codes)]
        return run_with_retries(command, self.folder, num_retries, self.said.append)

    def starts(self) -> list[str]:
        return (self.folder / "starts").read_text().splitlines()


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervised:
    return Supervised(tmp_path, monkeypatch)


def test_a_driver_that_dies_is_started_again_to_resume_after_growing_waits(
    supervised: Supervised,
) -> None:
    assert supervised.run(-9, 1, -11, 0) == 0
    assert supervised.starts() == [".", *["run.resume=auto."] * 3]
    assert supervised.waits == [5.0, 10.0, 20.0]
    assert "exit code 137" in supervised.said[0]


def test_retries_come_to_an_end(supervised: Supervised) -> None:
    assert supervised.run(1, 1, -9, 0, num_retries=2) == 137
    assert len(supervised.starts()) == 3


@pytest.mark.parametrize("code", [0, 2, 130, 143, -2, -15])
def test_an_end_that_was_meant_or_is_the_users_is_not_tried_again(
    supervised: Supervised, code: int
) -> None:
    assert supervised.run(code) == (code if code >= 0 else 128 - code)
    assert len(supervised.starts()) == 1


@pytest.mark.parametrize(
    ("error", "num_starts"), [(DivergenceError, 1), (LedgerError, 1), (RlhfError, 4)]
)
def test_an_error_that_the_same_commit_leads_to_is_not_tried_again(
    supervised: Supervised, tmp_path: Path, error: type[RlhfError], num_starts: int
) -> None:
    with pytest.raises(error), reporting_status("mine", tmp_path):
        raise error("its message")
    assert supervised.run(1, 1, 1, 1) == 1
    assert len(supervised.starts()) == num_starts


def test_a_run_that_was_to_be_stopped_is_not_started_again(
    supervised: Supervised, tmp_path: Path
) -> None:
    ControlFiles(tmp_path).request(stop=True)
    assert supervised.run(-9) == 137
    assert len(supervised.starts()) == 1


PARENT = """
import sys
from pathlib import Path
from rlhf_ray import interruption
from rlhf_ray.jobs.retries import run_with_retries

with interruption.handled():
    code = run_with_retries([sys.executable, "-c", sys.argv[2]], Path(sys.argv[1]), 3, print)
sys.exit(interruption.exit_code() or code)
"""
WAITING_DRIVER = """
import os, signal, sys, time

def end(number, _):
    print("ended by", number, flush=True)
    time.sleep(0.3)
    os._exit(128 + number)

signal.signal(signal.SIGTERM, end)
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_what_ends_the_parent_ends_the_driver(
    tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    """SIGTERM is passed on, and its driver waited for; a killed parent leaves no driver behind."""
    command = [sys.executable, "-c", PARENT, str(tmp_path), WAITING_DRIVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        driver = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, sent)
        assert parent.wait(20) == code
        assert parent.stdout.read().splitlines()[:1] == ["ended by 15"]
    deadline = time.monotonic() + 10
    while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
