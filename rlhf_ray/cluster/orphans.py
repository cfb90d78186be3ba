"""Orphan cleanup: end the processes and remove the shared memory that a killed run left behind.

While a run lives, a record in the temporary folder lists its processes (`process_identity`) and the
shared-memory files that they map. The next run cleans up after every record whose driver is dead. A
process id that the system has reused since is recognised by its start. In a cluster that a run
joins, each actor has such a record on its node, and the next one that starts there cleans up.

The temporary folder is open to every user of the machine, so records count only in a folder that
nobody else can enter, and only this user's processes and shared memory are touched.
"""

import json
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

from rlhf_ray.cluster.process_identity import (
    ProcessIdentity,
    identity,
    is_visible,
    living_process,
)
from rlhf_ray.disk import (
    is_private,
    make_private,
    private_name,
    temporary_folder,
    write_atomically,
)

SHARED_MEMORY = "/dev/shm/"
_OUR_NAMES = re.compile(
    r"(sem\.|psm_|torch_|vllm|nccl-|cuda\.shm\.|deepspeed_|plasma|ray|rlhf_ray)"
)
"""How shared memory of a run's libraries is called: semaphores and blocks of Python, PyTorch, vLLM,
NCCL, CUDA, DeepSpeed, Ray. A record that names another file is not one of ours."""
INTERVAL_S = 1.0
"""Interval between two updates of the record, which take 20 ms each. What a run starts between the
last update and its death is not cleaned up."""


class _Record(TypedDict):
    """The contents of a record."""

    driver: ProcessIdentity
    processes: list[ProcessIdentity]
    files: list[str]


_RECORD = TypeAdapter(_Record)


def records_folder() -> Path:
    """Return the folder of records, one for each user of the machine; it may not exist."""
    return temporary_folder() / private_name()


class ProcessRecord:
    """The record of this process and its descendants.

    A thread keeps it up to date until it is settled or closed.

    Args:
        folder: of records.
    """

    def __init__(self, folder: Path | None = None) -> None:
        folder = make_private(folder or records_folder())
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
        mapped = _mapped_inodes(self._driver.pid)
        for process in self._driver.children(recursive=True):
            try:
                entry = identity(process)
            except psutil.Error:
                continue
            self._processes[f"{entry['pid']}/{entry['started']}"] = entry
            mapped |= _mapped_inodes(process.pid)
        self._files |= {
            file
            for file, inode in _shared_files()
            if inode in mapped and _is_our_shared_memory(file)
        }
        record = {
            "driver": identity(self._driver),
            "processes": list(self._processes.values()),
            "files": sorted(self._files),
        }
        write_atomically(self._path, json.dumps(record))

    def _keep(self) -> None:
        while not self._closed.wait(INTERVAL_S):
            self.update()

    def settle(self) -> None:
        """Update it a last time: nothing more will be started."""
        # The thread ends first: it would write the record again after its deletion.
        self._closed.set()
        self._thread.join()
        self.update()

    def close(self) -> None:
        """Clean up what is left of this run, and delete its record."""
        self.settle()
        _clean_up_record(self._path)


def clean_up(folder: Path | None = None) -> tuple[int, int]:
    """Clean up after dead runs; return how many processes and files were removed."""
    processes = files = 0
    for path, record in _records(folder or records_folder()):
        if record is None:
            path.unlink(missing_ok=True)
        elif _is_dead(record["driver"]):
            ended, removed = _clean_up_record(path)
            processes, files = processes + ended, files + removed
    return processes, files


def count_orphans(folder: Path | None = None) -> int:
    """Count the living processes of dead runs, which `clean_up` would end."""
    return sum(
        len(_survivors(record))
        for _, record in _records(folder or records_folder())
        if record is not None and _is_dead(record["driver"])
    )


def _records(folder: Path) -> Iterator[tuple[Path, _Record | None]]:
    """Yield this user's records, None where malformed; nothing of a folder open to others."""
    for path in folder.glob("*.json") if is_private(folder) else ():
        yield path, _read(path)


def _read(path: Path) -> _Record | None:
    """Return a record; None where it is malformed, a link, or another user's file."""
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid():
            return None
        return _RECORD.validate_json(path.read_bytes(), strict=True)
    except (OSError, ValidationError):
        return None


def _is_dead(driver: ProcessIdentity) -> bool:
    """Return whether a driver is known to be gone: one of another container may live."""
    return is_visible(driver) and living_process(driver) is None


def _clean_up_record(path: Path) -> tuple[int, int]:
    record = _read(path)
    survivors = _survivors(record) if record else []
    # Trackers last: once the processes they serve are dead, they remove their semaphores and end.
    trackers = [process for process in survivors if _is_resource_tracker(process)]
    _kill(set(survivors) - set(trackers))
    psutil.wait_procs(survivors, timeout=5)
    _kill(trackers)
    files = set(filter(_is_our_shared_memory, record["files"] if record else []))
    # Whoever maps a file still, such as a process that shared it with the dead one, keeps it.
    mapped = set[int]().union(*(_mapped_inodes(pid) for pid in psutil.pids() if files))
    left = [file for file, inode in _shared_files() if file in files and inode not in mapped]
    for file in left:
        Path(file).unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return len(survivors), len(left)


def _survivors(record: _Record) -> list[psutil.Process]:
    """Return the living processes of a record that are this user's, this one's parents left out."""
    mine = psutil.Process()
    spared = {mine, *mine.parents()}
    found = [process for entry in record["processes"] if (process := living_process(entry))]
    return [process for process in found if process not in spared and _is_own(process)]


def _is_own(process: psutil.Process) -> bool:
    try:
        return process.uids().real == os.getuid()
    except psutil.Error:
        return False


def _is_our_shared_memory(file: str) -> bool:
    """Return whether a name is that of a file of this user's, right in shared memory, of a run."""
    name = file.removeprefix(SHARED_MEMORY)
    if name == file or "/" in name or "\0" in name or not _OUR_NAMES.match(name):
        return False
    try:
        found = os.lstat(file)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()


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
