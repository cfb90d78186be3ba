"""The next start cleans up after a killed driver; nothing else is touched."""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_ray.cluster.orphans import ProcessRecord, clean_up, count_orphans
from rlhf_ray.cluster.process_identity import identity
from rlhf_ray.errors import ConfigError

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
        entry: dict[str, Any] = dict(identity(psutil.Process(bystander.pid)))
        dead = {**identity(), "started": 1}  # this id, long ago
        reused = entry | {"started": entry["started"] - 100}
        record(tmp_path, dead, [reused], [])
        assert clean_up(tmp_path) == (0, 0)
        assert living_process(bystander.pid)
        # The same record with the true start is of that process: the start is what decides.
        record(tmp_path, dead, [entry], [])
        assert clean_up(tmp_path) == (1, 0)
        assert not living_process(bystander.pid)
    finally:
        bystander.kill()
        bystander.wait()


@linux_only
def test_shared_memory_that_the_living_map_too_outlives_the_dead(
    tmp_path: Path, shared_file: Path
) -> None:
    dead = {**identity(), "started": 1}  # this id, long ago
    with shared_file.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        record(tmp_path, dead, [], [str(shared_file)])
        assert clean_up(tmp_path) == (0, 0)
        assert shared_file.exists()
    record(tmp_path, dead, [], [str(shared_file)])
    assert clean_up(tmp_path) == (0, 1)
    assert not shared_file.exists()


@linux_only
def test_a_step_of_the_clock_leaves_a_living_run_alone(
    driver: Driver, tmp_path: Path, shared_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot_time = psutil._pslinux.boot_time()  # type: ignore[attr-defined]
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_time + 1)  # type: ignore[attr-defined]
    assert count_orphans(tmp_path) == 0
    assert clean_up(tmp_path) == (0, 0)
    assert all(living_process(pid) for pid in [driver.process.pid, *driver.descendants])
    assert shared_file.exists()
    assert len(list(tmp_path.iterdir())) == 1, "the record stays"
    driver.process.kill()
    _wait_until_dead(driver.process.pid)
    assert clean_up(tmp_path) == (2, 2), "nor does it hide what a dead run has left"


def test_the_record_of_another_container_is_left_alone(tmp_path: Path) -> None:
    elsewhere = {**identity(), "started": 1, "namespace": "pid:[1]"}
    record(tmp_path, elsewhere, [dict(identity())], [])
    assert count_orphans(tmp_path) == 0
    assert clean_up(tmp_path) == (0, 0)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_record_that_does_not_parse_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text('{"driver": ')
    (tmp_path / "2.json").write_text("{}")
    assert clean_up(tmp_path) == (0, 0)
    assert list(tmp_path.iterdir()) == []


REST = '"boot": "b", "namespace": "n", "name": "x"'
MALFORMED = (
    "[]",
    "null",
    '{"driver": 3}',
    '{"driver": {"pid": "1", "started": 1.0, ' + REST + '}, "processes": [], "files": []}',
    '{"driver": {"pid": -1, "started": 1.0, ' + REST + '}, "processes": [], "files": []}',
    '{"driver": {"pid": 1, "started": 1.0, ' + REST + '}, "processes": {}, "files": []}',
    '{"driver": {"pid": 1, "started": 1.0, ' + REST + '}, "processes": [7], "files": []}',
    '{"driver": {"pid": 1, "started": 1.0, ' + REST + '}, "processes": [], "files": [null]}',
    '{"driver": {"pid": 1' + "0" * 5000 + "}}",
    "[" * 100_000,
    "\0",
    "\udcff",
)


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_record_is_dropped_and_the_others_are_cleaned_up(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "0.json").write_bytes(text.encode(errors="surrogateescape"))
    record(tmp_path, DEAD, [], [])
    assert count_orphans(tmp_path) == 0
    assert clean_up(tmp_path) == (0, 0)
    assert list(tmp_path.iterdir()) == []


DEAD = {**identity(), "started": 1}
"""The driver of a record: this process's id, long ago."""


@pytest.fixture
def bystander() -> Iterator[psutil.Process]:
    """A process that no run of ours started."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


def identity_of(process: psutil.Process) -> dict:
    return dict(identity(process))


@pytest.mark.parametrize("plant", ["open", "link", "foreign"])
def test_a_folder_of_records_that_others_can_write_to_is_ignored_and_never_written(
    tmp_path: Path, bystander: psutil.Process, plant: str
) -> None:
    folder = tmp_path / "rlhf_ray-0"
    folder.mkdir(mode=0o700)
    record(folder, DEAD, [identity_of(bystander)], [])
    if plant == "open":
        folder.chmod(0o777)
    elif plant == "link":
        folder = tmp_path / "link"
        folder.symlink_to(tmp_path / "rlhf_ray-0")
    elif os.getuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        pytest.skip("only root can give a folder away")
    assert count_orphans(folder) == 0
    assert clean_up(folder) == (0, 0)
    assert living_process(bystander.pid)
    with pytest.raises(ConfigError, match="not a folder that only you can enter"):
        ProcessRecord(folder)


@pytest.mark.parametrize("plant", ["link", "foreign"])
def test_a_record_of_another_user_is_ignored(
    tmp_path: Path, bystander: psutil.Process, plant: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = tmp_path / "records"
    folder.mkdir(mode=0o700)
    record(elsewhere, DEAD, [identity_of(bystander)], [])
    planted = folder / f"{os.getpid()}.json"
    if plant == "link":
        planted.symlink_to(elsewhere / planted.name)
    elif os.getuid() == 0:
        record(folder, DEAD, [identity_of(bystander)], [])
        os.chown(planted, 12345, -1)
    else:
        pytest.skip("only root can give a file away")
    assert clean_up(folder) == (0, 0)
    assert living_process(bystander.pid)
    assert (elsewhere / planted.name).exists() or plant == "foreign"


@linux_only
def test_only_our_own_files_in_shared_memory_are_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("kept")
    mine, other, link = (
        Path(f"/dev/shm/{name}-{os.getpid()}") for name in ("psm_test", "another", "psm_link")
    )
    mine.touch()
    other.touch()
    link.symlink_to(precious)
    up = f"/dev/shm/psm_x/../../..{precious}"
    named = [str(precious), f"/dev/shm/..{precious}", up, "/dev/shm/", "", "psm_x\0", str(other)]
    try:
        folder = tmp_path / "records"
        folder.mkdir(mode=0o700)
        record(folder, DEAD, [], [*named, str(link), str(mine)])
        assert clean_up(folder) == (0, 1)
        assert precious.read_text() == "kept"
        assert other.exists()
        assert link.is_symlink()
        assert not mine.exists()
    finally:
        for file in (mine, other, link):
            file.unlink(missing_ok=True)


def test_the_process_that_sweeps_and_its_parents_are_spared(tmp_path: Path) -> None:
    family = [psutil.Process(), *psutil.Process().parents()]
    record(tmp_path, DEAD, [identity_of(process) for process in family], [])
    assert count_orphans(tmp_path) == 0
    assert clean_up(tmp_path) == (0, 0)


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
