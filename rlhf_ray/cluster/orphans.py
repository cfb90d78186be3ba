"""Orphan cleanup: end the processes and remove the shared memory that a killed run left behind.

While a run lives, a record in the temporary folder lists its processes (id, start time, name) and
the shared-memory files that they map. The next run cleans up after every record whose driver is
dead. A process id that the system has reused since is recognised by its start time.
"""

import json
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import psutil

from rlhf_ray.disk import write_atomically

SHARED_MEMORY = "/dev/shm/"
INTERVAL_S = 1.0
"""Interval between two updates of the record, which take 20 ms each. What a run starts between the
last update and its death is not cleaned up."""


class ProcessIdentity(TypedDict):
    """Identifies a process beyond the reuse of its id; part of records and of status.json."""

    pid: int
    started: float
    name: str


def records_folder() -> Path:
    """Return the folder of records, one for each user of the machine."""
    return Path(tempfile.gettempdir()) / f"rlhf_ray-{os.getuid()}"


class ProcessRecord:
    """Keeps this run's record up to date from a thread, until it is closed."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or records_folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        self._path = folder / f"{os.getpid()}.json"
        self._driver = psutil.Process()
        self._processes: dict[str, ProcessIdentity] = {}
        self._files: set[str] = set()
        self._closed = threading.Event()
        self.update()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="process-record")
        self._thread.start()

    def update(self) -> None:
        """Record every descendant and every shared-memory file seen so far."""
        mapped = set()
        for process in self._driver.children(recursive=True):
            try:
                entry = identity(process)
            except psutil.Error:
                continue
            self._processes[f"{entry['pid']}/{entry['started']}"] = entry
            mapped |= _mapped_inodes(process.pid)
        self._files |= {file for file, inode in _shared_files() if inode in mapped}
        record = {
            "driver": identity(self._driver),
            "processes": list(self._processes.values()),
            "files": sorted(self._files),
        }
        write_atomically(self._path, json.dumps(record))

    def _keep(self) -> None:
        while not self._closed.wait(INTERVAL_S):
            self.update()

    def close(self) -> None:
        """Clean up what is left of this run, and delete its record."""
        # The thread ends first: it would write the record again after its deletion.
        self._closed.set()
        self._thread.join()
        self.update()
        _clean_up_record(self._path)


def clean_up(folder: Path | None = None) -> tuple[int, int]:
    """Clean up after dead runs; return how many processes and files were removed."""
    processes = files = 0
    for path in (folder or records_folder()).glob("*.json"):
        try:
            driver = json.loads(path.read_text(encoding="utf-8"))["driver"]
        except (OSError, ValueError, KeyError):
            path.unlink(missing_ok=True)
            continue
        if living_process(driver) is None:
            ended, removed = _clean_up_record(path)
            processes, files = processes + ended, files + removed
    return processes, files


def count_orphans(folder: Path | None = None) -> int:
    """Count the living processes of dead runs, which `clean_up` would end."""
    count = 0
    for path in (folder or records_folder()).glob("*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if living_process(record["driver"]) is None:
                count += sum(living_process(entry) is not None for entry in record["processes"])
        except (OSError, ValueError, KeyError):
            continue
    return count


def _clean_up_record(path: Path) -> tuple[int, int]:
    record = json.loads(path.read_text(encoding="utf-8"))
    survivors = [process for entry in record["processes"] if (process := living_process(entry))]
    # Trackers last: once the processes they serve are dead, they remove their semaphores and end.
    trackers = [process for process in survivors if _is_resource_tracker(process)]
    _kill(set(survivors) - set(trackers))
    psutil.wait_procs(survivors, timeout=5)
    _kill(trackers)
    removed = 0
    for file in record["files"]:
        if Path(file).exists():
            Path(file).unlink(missing_ok=True)
            removed += 1
    path.unlink(missing_ok=True)
    return len(survivors), removed


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.Error:
            continue


def _is_resource_tracker(process: psutil.Process) -> bool:
    """Return whether it is multiprocessing's resource tracker.

    Only the tracker knows the names of the semaphores that its processes made.
    """
    try:
        return any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def identity(process: psutil.Process | None = None) -> ProcessIdentity:
    """Return what identifies a process (default: this one)."""
    process = process or psutil.Process()
    return {"pid": process.pid, "started": process.create_time(), "name": process.name()}


def living_process(entry: ProcessIdentity) -> psutil.Process | None:
    """Return the process of an `identity`; None if it is gone or its id was reused."""
    try:
        process = psutil.Process(entry["pid"])
        same = process.create_time() == entry["started"] and process.status() != "zombie"
    except psutil.Error:
        return None
    return process if same else None


def _mapped_inodes(pid: int) -> set[int]:
    """Return the inodes of the shared memory that a process maps (Linux; none elsewhere).

    Inodes, not names: a semaphore's file is created under one name and then renamed.
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if SHARED_MEMORY in line}


def _shared_files() -> list[tuple[str, int]]:
    """Return every file in shared memory with its inode."""
    if not os.path.isdir(SHARED_MEMORY):
        return []
    with os.scandir(SHARED_MEMORY) as files:
        return [(file.path, file.inode()) for file in files]
