"""What a dead run leaves on a machine, and its sweeping.

While a run lives, a record in the temporary folder names its processes (id, start time, name) and
the shared-memory files that they map. The next run kills and removes what records of dead drivers
name; a process id that was given to someone else since is told by its start time.
"""

import json
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

SHARED_MEMORY = "/dev/shm/"
INTERVAL_S = 1.0
"""Between two looks at what this run holds (20 ms each): what a run made since the last one, and
died, is not swept."""


def records_folder() -> Path:
    """Where records are kept: one folder a user."""
    return Path(tempfile.gettempdir()) / f"rlhf_ray-{os.getuid()}"


def write_whole(path: Path, values: dict[str, Any]) -> None:
    """Write JSON that others read at any time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(values), encoding="utf-8")
    os.replace(temporary, path)


class ProcessRecord:
    """Keeps the record of this run up to date from a thread, until it is closed."""

    def __init__(self, folder: Path | None = None) -> None:
        folder = folder or records_folder()
        folder.mkdir(mode=0o700, exist_ok=True)
        self._path = folder / f"{os.getpid()}.json"
        self._driver = psutil.Process()
        self._processes: dict[str, dict[str, Any]] = {}
        self._files: set[str] = set()
        self._closed = threading.Event()
        self.update()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="process-record")
        self._thread.start()

    def update(self) -> None:
        """Write down every descendant and shared-memory file seen so far."""
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
        write_whole(self._path, record)

    def _keep(self) -> None:
        while not self._closed.wait(INTERVAL_S):
            self.update()

    def close(self) -> None:
        """Sweep what is left of this run and drop the record."""
        self._closed.set()
        self._thread.join()
        self.update()
        _sweep_record(self._path)


def sweep(folder: Path | None = None) -> tuple[int, int]:
    """End what dead runs left; returns the numbers of processes and files."""
    processes = files = 0
    for path in (folder or records_folder()).glob("*.json"):
        try:
            driver = json.loads(path.read_text(encoding="utf-8"))["driver"]
        except (OSError, ValueError, KeyError):
            path.unlink(missing_ok=True)
            continue
        if alive(driver) is None:
            ended, removed = _sweep_record(path)
            processes, files = processes + ended, files + removed
    return processes, files


def num_left_over(folder: Path | None = None) -> int:
    """Living processes of dead runs, which `sweep` would end."""
    count = 0
    for path in (folder or records_folder()).glob("*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            dead = alive(record["driver"]) is None
            count += sum(alive(entry) is not None for entry in record["processes"]) if dead else 0
        except (OSError, ValueError, KeyError):
            continue
    return count


def _sweep_record(path: Path) -> tuple[int, int]:
    record = json.loads(path.read_text(encoding="utf-8"))
    survivors = [process for entry in record["processes"] if (process := alive(entry))]
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
    """Whether it is multiprocessing's: once those that it serves are dead it removes their
    semaphores, which it alone knows by name, and ends."""
    try:
        return any("multiprocessing.resource_tracker" in part for part in process.cmdline())
    except psutil.Error:
        return False


def identity(process: psutil.Process | None = None) -> dict[str, Any]:
    """By what a process, default this one, is known again: id, start time, name."""
    process = process or psutil.Process()
    return {"pid": process.pid, "started": process.create_time(), "name": process.name()}


def alive(entry: dict[str, Any]) -> psutil.Process | None:
    """The process of an `identity`, if it is still the same one."""
    try:
        process = psutil.Process(entry["pid"])
        same = process.create_time() == entry["started"] and process.status() != "zombie"
    except psutil.Error:
        return None
    return process if same else None


def _mapped_inodes(pid: int) -> set[int]:
    """Inodes of the shared memory that a process maps (Linux; none elsewhere).

    Not by name: a semaphore's file is made under another name than the one that it then has.
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if SHARED_MEMORY in line}


def _shared_files() -> list[tuple[str, int]]:
    """Every file in shared memory with its inode."""
    if not os.path.isdir(SHARED_MEMORY):
        return []
    with os.scandir(SHARED_MEMORY) as files:
        return [(file.path, file.inode()) for file in files]
