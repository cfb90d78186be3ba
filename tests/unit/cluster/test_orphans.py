"""What a killed driver leaves is cleaned up by the next start; nothing else is touched."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from rlhf_ray.cluster.orphans import clean_up, count_orphans

DRIVER = """
import mmap, subprocess, sys, time
from pathlib import Path
from rlhf_ray.cluster.orphans import ProcessRecord

child_code = '''
import mmap, multiprocessing, os, signal, subprocess, sys, time
from multiprocessing import resource_tracker
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 4096)
semaphore = multiprocessing.get_context("spawn").Semaphore()
os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(grandchild.pid, semaphore._semlock.name, flush=True)
time.sleep(600)
'''
child = subprocess.Popen(
    [sys.executable, "-c", child_code, sys.argv[2]], stdout=subprocess.PIPE, text=True
)
grandchild, semaphore = child.stdout.readline().split()
ProcessRecord(Path(sys.argv[1]))
print(child.pid, grandchild, semaphore, flush=True)
time.sleep(600)
"""

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/shm is Linux's")


@pytest.fixture
def shared_file() -> Iterator[Path]:
    """A page in shared memory."""
    path = Path(f"/dev/shm/rlhf_ray-test-{os.getpid()}")
    path.write_bytes(b"\0" * 4096)
    yield path
    path.unlink(missing_ok=True)


@dataclass
class Driver:
    """A driver that keeps a record, its child and grandchild, and a semaphore of the child's whose
    resource tracker is dead."""

    process: psutil.Process
    descendants: list[int]
    semaphore: Path


@pytest.fixture
def driver(tmp_path: Path, shared_file: Path) -> Iterator[Driver]:
    """A driver whose child maps ``shared_file``."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(shared_file)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child, grandchild, semaphore = process.stdout.readline().split()
    descendants = [int(child), int(grandchild)]
    file = Path(f"/dev/shm/sem.{semaphore.removeprefix('/')}")
    yield Driver(psutil.Process(process.pid), descendants, file)
    process.kill()
    process.wait()
    process.stdout.close()
    for pid in descendants:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def living_process(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != "zombie"
    except psutil.Error:
        return False


@linux_only
def test_processes_and_files_of_a_killed_driver_are_cleaned_up(
    driver: Driver, tmp_path: Path, shared_file: Path
) -> None:
    process = driver.process
    assert count_orphans(tmp_path) == 0
    assert clean_up(tmp_path) == (0, 0), "a living driver's are its own"
    assert all(living_process(pid) for pid in driver.descendants)
    assert shared_file.exists()
    assert driver.semaphore.exists()
    process.kill()
    psutil.wait_procs([process], timeout=5)
    _wait_until_dead(process.pid)
    assert count_orphans(tmp_path) == 2
    assert clean_up(tmp_path) == (2, 2)
    assert count_orphans(tmp_path) == 0
    assert not any(living_process(pid) for pid in driver.descendants)
    assert not shared_file.exists()
    assert not driver.semaphore.exists()
    assert list(tmp_path.iterdir()) == []
    assert clean_up(tmp_path) == (0, 0)


def _wait_until_dead(pid: int) -> None:
    deadline = time.monotonic() + 5
    while living_process(pid) and time.monotonic() < deadline:
        time.sleep(0.01)


def record(folder: Path, driver: dict, processes: list[dict], files: list[str]) -> None:
    """Write a record by hand."""
    content = {"driver": driver, "processes": processes, "files": files}
    (folder / f"{driver['pid']}.json").write_text(json.dumps(content))


def test_a_process_with_a_reused_id_is_spared(tmp_path: Path) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        started = psutil.Process(bystander.pid).create_time()
        dead = {"pid": os.getpid(), "started": 1.0, "name": "python"}  # this id, long ago
        reused = {"pid": bystander.pid, "started": started - 100, "name": "python"}
        record(tmp_path, dead, [reused], [])
        assert clean_up(tmp_path) == (0, 0)
        assert living_process(bystander.pid)
        # The same record with the true start time is of that process: the time is what decides.
        record(tmp_path, dead, [reused | {"started": started}], [])
        assert clean_up(tmp_path) == (1, 0)
        assert not living_process(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


def test_a_record_that_does_not_parse_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text('{"driver": ')
    (tmp_path / "2.json").write_text("{}")
    assert clean_up(tmp_path) == (0, 0)
    assert list(tmp_path.iterdir()) == []


CLOSER = """
import json, os, subprocess, sys
from pathlib import Path
import psutil
from rlhf_ray.cluster.orphans import ProcessRecord

child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
record = ProcessRecord(Path(sys.argv[1]))
print((Path(sys.argv[1]) / f"{os.getpid()}.json").read_text())
record.close()
print(json.dumps([os.getpid(), child.pid, psutil.pid_exists(child.pid)]))
"""


def test_closing_a_record_ends_what_is_left_of_the_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CLOSER, str(tmp_path)], capture_output=True, text=True, check=True
    )
    content, (driver, child, lives) = map(json.loads, done.stdout.splitlines())
    assert content["driver"]["pid"] == driver
    assert child in {entry["pid"] for entry in content["processes"]}
    assert not lives
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_there_is_nothing_to_clean_up(tmp_path: Path) -> None:
    assert clean_up(tmp_path / "absent") == (0, 0)
