"""Identifies a process beyond the reuse of its id, without a clock.

A start time in seconds would not do: it is the time of the machine's boot, which every correction
of the clock moves, plus the kernel's count of ticks. Here that count stands alone, beside the id of
the boot that it belongs to.
"""

import os
from functools import cache
from pathlib import Path
from typing import Annotated, NotRequired

import psutil
from pydantic import Field
from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

PROC = Path("/proc")


class ProcessIdentity(TypedDict):
    """Part of records and of status.json."""

    pid: Annotated[int, Field(gt=0, lt=2**31)]
    started: float
    """Clock ticks between the machine's boot and the process's start."""
    boot: NotRequired[str]
    """Id of the boot; another one after each. Folders of earlier versions lack it."""
    namespace: NotRequired[str]
    """Namespace of the process id: containers of one machine count their processes alone."""
    name: str


def identity(process: psutil.Process | None = None) -> ProcessIdentity:
    """Return what identifies a process (default: this one).

    Raises:
        psutil.Error: it is gone.
    """
    process = process or psutil.Process()
    return {
        "pid": process.pid,
        "started": _started(process),
        "boot": boot_id(),
        "namespace": namespace(),
        "name": process.name(),
    }


def living_process(entry: ProcessIdentity) -> psutil.Process | None:
    """Return the process of an `identity`; None if it is gone or its id was reused.

    None as well for one of another namespace, which cannot be seen from here: see `is_visible`.
    """
    if entry.get("boot") != boot_id() or not is_visible(entry):
        return None
    try:
        process = psutil.Process(entry["pid"])
        same = _started(process) == entry["started"] and process.status() != "zombie"
    except psutil.Error:
        return None
    return process if same else None


def is_visible(entry: ProcessIdentity) -> bool:
    """Return whether a process of this machine would be seen from here while it lives."""
    return entry.get("boot") != boot_id() or entry.get("namespace") == namespace()


def same_process(one: ProcessIdentity, other: ProcessIdentity) -> bool:
    """Return whether two identities are of one process, which may have changed its name."""
    return {**one, "name": ""} == {**other, "name": ""}


@cache
def boot_id() -> str:
    """Return the id of the machine's current boot; empty where the system has none."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def namespace() -> str:
    """Return the namespace of this process's id; empty where the system has none."""
    try:
        return os.readlink(PROC / "self/ns/pid")
    except OSError:
        return ""


def _started(process: psutil.Process) -> float:
    """Return the start in ticks since the boot; where there is no /proc, as the kernel keeps it."""
    try:
        stat = (PROC / str(process.pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return process.create_time()
    # The name, in parentheses, may hold spaces and parentheses itself. Field 22 of proc(5).
    return int(stat.rpartition(")")[2].split()[19])
