"""The processes of a run: found by a mark in their environment, told apart by their titles."""

import os
import re
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
MARK = "RLHF_RAY_TEST_MARK"
STARTING = ("starting", "restoring")
"""Phases of a process that does not do its role's work yet."""
_TITLE = re.compile(r"ray::(?P<name>[a-z_]+-\d+)(?: v\d+)? (?P<doing>.+)")
_ENGINE = "VLLM::EngineCore"


class Seen:
    """A living process."""

    def __init__(self, process: psutil.Process) -> None:
        self.process = process
        self.title = ""
        self.name = ""
        """Of its actor, such as ``policy-0``; ``engine-0`` of a generator's engine; else empty."""
        self.ready = False
        """Whether it has finished its start."""

    @property
    def role(self) -> str:
        """The role of its name."""
        return self.name.rpartition("-")[0]

    def read(self) -> None:
        """Read its title."""
        try:
            written = Path(f"/proc/{self.process.pid}/cmdline").read_bytes()
        except OSError:
            return
        self.title = written.replace(b"\0", b" ").decode(errors="replace").strip()
        if self.title.startswith(_ENGINE):
            self.name, self.ready = "engine-0", True
        elif found := _TITLE.match(self.title):
            self.name, self.ready = found["name"], found["doing"] not in STARTING


class Marked:
    """All living processes with a mark in their environment, and the shared memory they map."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.seen: dict[int, Seen] = {}
        """By process id, as of the last `refresh`."""
        self._others: set[int] = set()
        self._mapped: dict[int, str] = {}
        """Inode of shared memory -> title of a process that has mapped it."""

    def refresh(self) -> dict[int, Seen]:
        """Read which processes live, and their titles."""
        pids = set(psutil.pids())
        self._others &= pids
        for pid in pids - self.seen.keys() - self._others:
            self._meet(pid)
        self.seen = {pid: seen for pid, seen in self.seen.items() if is_alive(seen.process)}
        for seen in self.seen.values():
            seen.read()
        return self.seen

    def _meet(self, pid: int) -> None:
        ours = has_mark(pid, self.mark)
        if ours:
            with suppress(psutil.Error):
                self.seen[pid] = Seen(psutil.Process(pid))
        elif ours is not None:
            self._others.add(pid)

    def titles(self) -> dict[int, str]:
        """Return the titles of the living processes, by process id."""
        return {pid: seen.title[:60] for pid, seen in self.seen.items()}

    def read_shared_memory(self) -> None:
        """Remember which shared memory the living processes map."""
        for pid, seen in self.seen.items():
            for inode in mapped_inodes(pid):
                self._mapped.setdefault(inode, seen.title[:60])

    def left_files(self) -> dict[str, str]:
        """Return the files in shared memory that our processes have mapped and nobody maps now.

        With the title of one of those processes.
        """
        mapped = set[int]().union(*(mapped_inodes(pid) for pid in psutil.pids()))
        left = self._mapped.keys() - mapped
        with os.scandir(SHARED_MEMORY) as files:
            return {f.path: self._mapped[f.inode()] for f in files if f.inode() in left}

    def kill_all(self) -> None:
        """Kill whatever is left, and remove its shared memory."""
        for seen in self.refresh().values():
            kill(seen)
        for file in self.left_files():
            Path(file).unlink(missing_ok=True)


def has_mark(pid: int, mark: str) -> bool | None:
    """Return whether a process was started with a mark; None while that cannot be told.

    The environment is read as it stands: a process that changes its title zeroes the start of that
    block, where psutil stops reading.
    """
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    if len(environment) < 2:  # it is empty while a program begins
        return None
    return f"{MARK}={mark}".encode() in environment


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process lives, and is no zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill(seen: Seen) -> None:
    """Kill a process by its id, unless the system has given that to another since."""
    with suppress(psutil.Error):
        seen.process.kill()


def mapped_inodes(pid: int) -> set[int]:
    """Return the inodes of the shared memory that a process maps.

    Not the names: a semaphore's file is made under another name than the one it has afterwards.
    """
    try:
        lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines if str(SHARED_MEMORY) in line}
