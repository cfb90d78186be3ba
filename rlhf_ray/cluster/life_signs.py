"""Signs of life of an actor's process, and deadlines that they renew.

    a thread of the process --> Ray's key-value store --> `Watch`, in whoever waits for it

A call takes as long as its machine is slow: the time says nothing about whether it will end. So a
wait ends when nothing has moved. What counts is what the process reports: a new phase, or units of
work (`observability.phases`). In a start its work and its children's (an engine's processes) count
too, files that they read, and memory that fills with weights; in a call they don't, nor where a
start waits for other ranks, because a process that hangs in a collective spins. The thread reports
while the process's own thread is busy, in its constructor too.
"""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil
from ray.experimental import internal_kv

from rlhf_ray.observability.phases import overdue, reported, waits_for_others
from rlhf_ray.observability.tracing import unix_now
from rlhf_ray.placement.bundles import role_of

INTERVAL_S = 2.0
"""Interval between two signs. They take 20 ms each in a start, else less than one."""
WORK_SHARE = 0.05
"""Share of a core that counts as work. An idle actor uses less than 1%, and a starting one on a
machine with ten times more processes than cores uses 10%."""
MEMORY_MB = 16
READ_MB_S = 0.5
"""Files read that count as work: ten times what measuring itself reads of ``/proc``."""
IMPORTING, STARTING = "importing its libraries", "starting"
"""What an actor does in its constructor, and in its method `start`."""
IN_STEP = ("policy", "critic")
"""Roles whose processes renew each other's deadlines: a learner's rank that waits for the others
does not move itself."""


@dataclass(frozen=True, slots=True)
class LifeSign:
    """How far a process has got."""

    phase: str
    """What it does, in words, with the units of work that it has done."""
    cpu_s: float = 0.0
    """CPU time, with its children's; measured in a start alone."""
    memory_mb: float = 0.0
    """Memory, with its children's; measured in a start alone."""
    read_mb: float = 0.0
    """What it and its children have read from files; measured in a start alone."""

    def __str__(self) -> str:
        if not self.memory_mb:
            return self.phase
        return (
            f"{self.phase} ({self.cpu_s:.0f} s of CPU time, {self.memory_mb:,.0f} MB of memory, "
            f"{self.read_mb:,.0f} MB read)"
        )


class LifeSigns:
    """Signs of this process, sent by a thread for as long as the process lives.

    What has not changed is not sent again.

    Args:
        actor_id: Ray's id of this actor; None: nobody waits for this process, and nothing is sent.
    """

    def __init__(self, actor_id: str | None) -> None:
        self.doing = IMPORTING
        """What the process does, in words; whoever knows sets it."""
        self._sent: LifeSign | None = None
        if actor_id is not None:
            self._key = _key(actor_id)
            self._send()
            threading.Thread(target=self._repeat, name="signs of life", daemon=True).start()

    def _repeat(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            self._send()

    def _send(self) -> None:
        with suppress(Exception):  # a store that does not answer must not keep it from working
            doing = self.doing
            phase = ": ".join(filter(None, (doing, reported())))
            may_load = doing in (IMPORTING, STARTING) and not waits_for_others()
            sign = _measure(phase) if may_load else LifeSign(phase)
            if sign != self._sent:
                internal_kv._internal_kv_put(self._key, json.dumps(asdict(sign)).encode())
                self._sent = sign


def last_sign(actor_id: str) -> LifeSign | None:
    """Return the last sign of an actor; None before the first."""
    written = internal_kv._internal_kv_get(_key(actor_id))
    return LifeSign(**json.loads(written)) if written else None


def forget(actor_id: str) -> None:
    """Remove an ended actor's last sign from the store, which outlives the run."""
    with suppress(Exception):
        internal_kv._internal_kv_del(_key(actor_id))


def _key(actor_id: str) -> bytes:
    return f"rlhf_ray/life/{actor_id}".encode()


def _measure(phase: str) -> LifeSign:
    cpu_s = memory = read = 0.0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):
            times = process.cpu_times()
            cpu_s += times.user + times.system
            memory += process.memory_info().rss
            if hasattr(process, "io_counters"):  # not on macOS
                counters = process.io_counters()
                # The first counts calls of `read`, the second pages of mapped files as well.
                read += max(counters.read_chars, counters.read_bytes)
    return LifeSign(phase, cpu_s, memory / 2**20, read / 2**20)


class Watch:
    """Watches the processes that a run waits for."""

    def __init__(self, read: Callable[[str], LifeSign | None] = last_sign) -> None:
        self._read = read
        self._reading: dict[str, asyncio.Task[LifeSign | None]] = {}
        self._last: dict[str, LifeSign] = {}
        self._counted: dict[str, LifeSign] = {}
        self._moved_at: dict[str, float] = {}

    async def overdue(
        self, name: str, actor_id: str, since: float, limit_s: float, key: str
    ) -> str | None:
        """Return why a process is not waited for any longer; None while it is.

        Args:
            name: of its actor.
            actor_id: Ray's id of it; an actor that takes the place of another has its own.
            since: when the call began, by `unix_now`.
            limit_s: longest time without a movement.
            key: the config key that holds the limit.
        """
        await self._look(actor_id)
        now, mover, sign = unix_now(), _mover(name, actor_id), self._last.get(actor_id)
        if sign is not None and _has_moved(self._counted.get(actor_id), sign, limit_s):
            self._counted[actor_id], self._moved_at[mover] = sign, now
        reason = overdue(now, since, self._moved_at.get(mover, since), limit_s, key)
        said = f"It last reported: {sign}" if sign else "It has reported nothing"
        return reason and f"{reason}. {said}"

    def silent_s(self, name: str, actor_id: str, since: float) -> float:
        """Return for how long a process that is waited for since a time has not moved."""
        return unix_now() - max(since, self._moved_at.get(_mover(name, actor_id), since))

    async def _look(self, actor_id: str) -> None:
        """Read the last sign; calls that wait for one actor read together.

        A store that does not answer must not hold up a call that has ended.
        """
        if actor_id not in self._reading:
            reading = asyncio.ensure_future(asyncio.to_thread(self._read, actor_id))
            self._reading[actor_id] = reading
            reading.add_done_callback(lambda done: self._keep(actor_id, done))
        await asyncio.wait([self._reading[actor_id]], timeout=INTERVAL_S)

    def _keep(self, actor_id: str, reading: "asyncio.Task[LifeSign | None]") -> None:
        del self._reading[actor_id]
        if not reading.cancelled() and reading.exception() is None and (sign := reading.result()):
            self._last[actor_id] = sign


def _mover(name: str, actor_id: str) -> str:
    """Return whose movements renew the deadline of a process: its role's, or its own alone."""
    role = role_of(name)
    return role if role in IN_STEP else actor_id


def _has_moved(before: LifeSign | None, sign: LifeSign, limit_s: float) -> bool:
    return (
        before is None
        or sign.phase != before.phase
        or abs(sign.cpu_s - before.cpu_s) >= WORK_SHARE * limit_s
        or abs(sign.memory_mb - before.memory_mb) >= MEMORY_MB
        or abs(sign.read_mb - before.read_mb) >= READ_MB_S * limit_s
    )
