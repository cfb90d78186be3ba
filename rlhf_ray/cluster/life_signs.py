"""Signs of life of a process that is starting, and deadlines that they renew.

    a thread of the process --> Ray's key-value store --> `Watch`, in whoever waits for it

A start takes as long as its machine is slow: the time says nothing about whether it will end. So a
wait ends when nothing has moved. What counts is a new phase, work of the process and its children
(an engine's processes), or memory that fills with weights. The thread reports while the process's
own thread is busy, in its constructor too.
"""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

import psutil
import ray
from ray.experimental import internal_kv

from rlhf_ray.observability.phases import reported
from rlhf_ray.observability.repeated import repeated

INTERVAL_S = 2.0
"""Interval between two signs, which take 20 ms each."""
LIMIT = 10
"""An absolute limit, in deadlines: for what moves forever without getting anywhere."""
WORK_SHARE = 0.05
"""Share of a core that counts as work. An idle actor uses less than 1%, and a starting one on a
machine with ten times more processes than cores uses 10%."""
MEMORY_MB = 16


@dataclass(frozen=True, slots=True)
class LifeSign:
    """How far a process has got."""

    phase: str
    """What it does, in words."""
    cpu_s: float
    """CPU time, with its children's."""
    memory_mb: float
    """Memory, with its children's."""

    def __str__(self) -> str:
        return f"{self.phase} ({self.cpu_s:.0f} s of CPU time, {self.memory_mb:,.0f} MB of memory)"


@contextmanager
def signs_of_life(name: str, doing: str) -> Iterator[None]:
    """Report signs of this process, the actor ``name``, while the block runs."""

    def send() -> None:
        if not internal_kv._internal_kv_initialized():
            return
        phase = ": ".join(filter(None, (doing, reported())))
        with suppress(Exception):  # a store that does not answer must not keep it from starting
            internal_kv._internal_kv_put(_key(name), json.dumps(asdict(_measure(phase))).encode())

    send()
    with repeated(send, INTERVAL_S, "signs of life"):
        yield


def last_sign(name: str) -> LifeSign | None:
    """Return the last sign of an actor of this run; None before the first."""
    if not internal_kv._internal_kv_initialized():
        return None
    written = internal_kv._internal_kv_get(_key(name))
    return LifeSign(**json.loads(written)) if written else None


def _key(name: str) -> bytes:
    return f"rlhf_ray/life/{ray.get_runtime_context().namespace}/{name}".encode()


def _measure(phase: str) -> LifeSign:
    cpu_s = memory = 0.0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):
            times = process.cpu_times()
            cpu_s += times.user + times.system
            memory += process.memory_info().rss
    return LifeSign(phase, cpu_s, memory / 2**20)


class Watch:
    """Watches the processes that a run starts.

    Those of a role renew each other's deadlines: a learner's rank that waits for the others to come
    up does not move itself.
    """

    def __init__(self, read: Callable[[str], LifeSign | None] = last_sign) -> None:
        self._read = read
        self._counted: dict[str, LifeSign] = {}
        self._moved_at: dict[str, float] = {}

    async def overdue(self, name: str, since: float, limit_s: float) -> str | None:
        """Return why a process is not waited for any longer; None while it is.

        Args:
            name: of its actor.
            since: the event loop's time at the call.
            limit_s: longest time without a movement.
        """
        sign, role = await asyncio.to_thread(self._read, name), name.rpartition("-")[0]
        now = asyncio.get_running_loop().time()
        if sign is not None and _has_moved(self._counted.get(name), sign, limit_s):
            self._counted[name], self._moved_at[role] = sign, now
        said = f"It last reported: {sign}" if sign else "It has reported nothing"
        if now - since > LIMIT * limit_s:
            return (
                f"within {LIMIT * limit_s:g} s, {LIMIT} times as long as it may stand still "
                f"(cluster.start_timeout_s). {said}"
            )
        if now - max(since, self._moved_at.get(role, since)) > limit_s:
            return (
                f"within {now - since:.0f} s, the last {limit_s:g} s (cluster.start_timeout_s) "
                f"without any progress. {said}"
            )
        return None


def _has_moved(before: LifeSign | None, sign: LifeSign, limit_s: float) -> bool:
    return (
        before is None
        or sign.phase != before.phase
        or abs(sign.cpu_s - before.cpu_s) >= WORK_SHARE * limit_s
        or abs(sign.memory_mb - before.memory_mb) >= MEMORY_MB
    )
