"""What this process is doing: the phase that it reported last, and the units of work it has done.

Whoever waits for it reads both (`cluster.life_signs`), and its deadline is renewed when either has
changed. Counting takes less than a microsecond, so inner loops may count.
"""

import asyncio
import faulthandler
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from rlhf_ray.observability.repeated import repeated

T = TypeVar("T")

LIMIT = 10
"""An absolute limit, in deadlines: for what moves forever without getting anywhere."""
LOOK_S = 2.0
"""Longest interval between two looks at what is waited for."""

_phase = ""
_waits = False
_done: dict[str, int] = {}
_read: dict[str, Callable[[], int]] = {}


def report(phase: str, *, waits: bool = False) -> None:
    """Report that a phase begins, such as ``loading the model``; empty: none.

    Args:
        phase: in words.
        waits: whether this process only waits for others in it; it may spin, as NCCL does, so its
            CPU time tells nothing.
    """
    global _phase, _waits
    _phase, _waits = phase, waits


def waits_for_others() -> bool:
    """Return whether this process only waits for others in its phase."""
    return _waits


def count(num: int, what: str) -> None:
    """Count units of work that are done, such as ``rows scored``."""
    _done[what] = _done.get(what, 0) + num


def read_count(what: str, read: Callable[[], int]) -> None:
    """Have the units of a kind read where a library counts them, whenever somebody looks."""
    _read[what] = read


def reported() -> str:
    """Return the last phase and the number of units of each kind; empty before the first."""
    counts = dict(_done)
    for what, read in _read.items():
        with suppress(Exception):  # it changes meanwhile, or another version counts elsewhere
            counts[what] = read()
    units = ", ".join(f"{num:,} {what}" for what, num in counts.items())
    return "; ".join(filter(None, (_phase, units)))


def overdue(now: float, since: float, moved_at: float, limit_s: float, key: str) -> str | None:
    """Return why nobody waits any longer; None while it is worth waiting.

    Args:
        now: time by a clock that never jumps, seconds.
        since: when the wait began, by the same clock.
        moved_at: when there was progress, by the same clock.
        limit_s: longest time without progress.
        key: the config key that holds the limit.
    """
    if now - since > LIMIT * limit_s:
        return f"within {LIMIT * limit_s:g} s, {LIMIT} times as long as it may stand still ({key})"
    if now - max(since, moved_at) > limit_s:
        return f"within {now - since:.0f} s, the last {limit_s:g} s ({key}) without any progress"
    return None


class Stalled(Exception):
    """Work of this process made no progress for too long; says within which time."""


async def while_it_moves(work: Awaitable[T], limit_s: float | None, key: str) -> T:
    """Await work as long as this process makes progress.

    Raises:
        Stalled: it made none for ``limit_s``, the value of the config key ``key``; or the work
            took `LIMIT` times as long.
    """
    if limit_s is None:
        return await work
    task, clock = asyncio.ensure_future(work), asyncio.get_running_loop().time
    since = moved_at = clock()
    before = reported()
    try:
        while not (await asyncio.wait([task], timeout=min(LOOK_S, limit_s / 4)))[0]:
            now, said = clock(), reported()
            if said != before:
                before, moved_at = said, now
            if reason := overdue(now, since, moved_at, limit_s, key):
                raise Stalled(reason)
        return task.result()
    finally:
        task.cancel()


@contextmanager
def ends_when_stalled(limit_s: float, key: str, who: str) -> Iterator[None]:
    """End this process, with its stacks on stderr, when the block makes no progress.

    For processes that a library starts and watches: it sees that they die, not that they hang.

    Args:
        limit_s: longest time without progress; in a phase, which counts nothing, `LIMIT` times it.
        key: the config key that holds the limit.
        who: name of the process in the message.
    """
    before, moved_at = reported(), time.monotonic()

    def look() -> None:
        nonlocal before, moved_at
        if (said := reported()) != before:
            before, moved_at = said, time.monotonic()
        longest_s = limit_s * LIMIT if _phase else limit_s
        if time.monotonic() - moved_at > longest_s:
            message = (
                f"{who} made no progress for {longest_s:g} s ({key}) and is ended. It last "
                f"reported: {said or 'nothing'}. Its threads:\n"
            )
            os.write(2, message.encode())
            faulthandler.dump_traceback(2)
            os._exit(1)

    with repeated(look, min(LOOK_S, limit_s / 4), "progress"):
        yield
