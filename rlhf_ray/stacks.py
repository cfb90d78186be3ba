"""Stacks of Python processes that hang, children included, read from outside.

By py-spy where it may attach to a process; else by a signal on which `register` has the process
write its own. Both work while a process is stuck in a library that holds the interpreter's lock.
"""

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil

SIGNAL = signal.SIGUSR2
"""Slurm users and Ray Tune take SIGUSR1."""
PY_SPY_S = 20.0
"""Longest time for py-spy to read one process."""
ANSWER_S = 2.0
"""Longest time for a process to write its own stacks."""
PAUSE_S = 0.1

FILE = "rlhf_ray-stacks"
"""Name of the file in memory into which a process writes them."""


def register() -> None:
    """Have this process write its stacks into a file in memory on `SIGNAL` (Linux)."""
    if hasattr(os, "memfd_create"):
        faulthandler.register(SIGNAL, os.memfd_create(FILE), all_threads=True, chain=False)


def stacks(pid: int, *, with_children: bool = True) -> str:
    """Return the stacks of a process on this machine, and of its children, as text."""
    try:
        process = psutil.Process(pid)
        children = process.children(recursive=True) if with_children else []
    except psutil.Error:
        return f"Process {pid} has ended.\n"
    return "\n".join(_described(each) for each in (process, *children))


def stacks_of(pids: Sequence[int]) -> dict[int, str]:
    """Return the stacks of some processes on this machine, with their children's."""
    with ThreadPoolExecutor() as threads:
        return dict(zip(pids, threads.map(stacks, pids), strict=True))


def _described(process: psutil.Process) -> str:
    try:
        heading = f"{process.pid} {process.status()} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return f"Process {process.pid} has ended.\n"
    found = _by_py_spy(process.pid) or _by_signal(process.pid)
    return f"== {heading}\n{found or 'No Python stack can be read.'}\n"


def _by_py_spy(pid: int) -> str:
    """Return what py-spy reads; nothing where it is not installed, or may not attach."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [program, "dump", "--pid", str(pid)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PY_SPY_S,
            check=False,
        )
        return done.stdout if done.returncode == 0 else ""
    return ""


def _by_signal(pid: int) -> str:
    """Return what a process writes on `SIGNAL`; nothing where that would end the process."""
    try:
        file = _file(pid)
        if file is None or not _handles(pid):
            return ""
        before = size = file.stat().st_size
        os.kill(pid, SIGNAL)
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            time.sleep(PAUSE_S)
            size, last = file.stat().st_size, size
            if before < last == size:  # it has grown, and grows no more
                break
        return file.read_bytes()[before:].decode(errors="replace")
    except OSError:  # the process has ended, or is another user's
        return ""


def _file(pid: int) -> Path | None:
    """Return the file into which a process, or the one that it was forked from, writes."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if os.readlink(entry).startswith(f"/memfd:{FILE} "):
                return entry
    return None


def _handles(pid: int) -> bool:
    """Return whether a process handles `SIGNAL`; by default it ends a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (SIGNAL - 1) & 1)
    return False
