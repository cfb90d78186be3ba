"""Two sides that take turns on the same GPUs: one works while the other sleeps in main memory.

    generate, publish --> [generators]      [learners] <-- score, assemble, learn, state
                                 \\            /
                           one of the two is awake

Nobody asks for a turn by name: a call to a worker of the sleeping side waits until the other side
has nothing more to do, and then the sides change places. So the loop is the same with and without
turns, and results are too; what is lost is that scoring overlaps with generation.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from rlhf_ray.cluster.role_clients import Worker
from rlhf_ray.errors import ActorFailure
from rlhf_ray.types import Handle

SIDES: Mapping[str, str] = {"generator": "generators", "policy": "learners", "critic": "learners"}
"""Role -> its side, where sides take turns (placement.turns)."""
POLL_S = 0.01
"""Between two looks at whether it is one's turn."""
GRACE_S = 0.05
"""How long a side may have nothing to do before it counts as done: its next call may be under
way, and to change places takes seconds."""


class Turns:
    """Who is awake, and how many of its calls are under way."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._started: dict[str, list[Worker]] = defaultdict(list)
        self._awake: str | None = None
        self._under_way = 0
        self._last_end_s = 0.0

    @asynccontextmanager
    async def turn(self, side: str) -> AsyncIterator[None]:
        """Within, the side is awake."""
        while not await self._begun(side):
            await asyncio.sleep(POLL_S)
        try:
            yield
        finally:
            self._under_way -= 1
            self._last_end_s = time.monotonic()

    async def _begun(self, side: str) -> bool:
        """Try to begin; sides that change places do so to the end, whoever is cancelled."""
        begin = asyncio.ensure_future(self._begin(side))
        try:
            return await asyncio.shield(begin)
        except asyncio.CancelledError:
            begin.add_done_callback(self._give_up)
            raise

    def _give_up(self, begin: "asyncio.Future[bool]") -> None:
        if not begin.cancelled() and begin.exception() is None:
            self._under_way -= begin.result()

    async def _begin(self, side: str) -> bool:
        async with self._lock:
            if side != self._awake:
                rested_s = time.monotonic() - self._last_end_s
                if self._under_way or rested_s < GRACE_S:
                    return False
                await self._change_places(side)
            self._under_way += 1
            return True

    async def _change_places(self, side: str) -> None:
        if self._awake is not None:
            await self._tell(self._awake, "sleep")
            self._awake = None
        await self._tell(side, "wake")
        self._awake = side

    async def _tell(self, side: str, method: str) -> None:
        """Every worker of a side; one that has died holds nothing, and its next call says so."""
        workers = [*self._started[side]]
        told = await asyncio.gather(*(w.call(method) for w in workers), return_exceptions=True)
        for worker, answer in zip(workers, told, strict=True):
            if isinstance(answer, ActorFailure):
                self.left(worker, side)
            elif isinstance(answer, BaseException):
                raise answer

    def joined(self, worker: Worker, side: str) -> None:
        """A worker of the side that is awake has started, and changes places from now on."""
        self._started[side].append(worker)

    def left(self, worker: Worker, side: str) -> None:
        """A worker has ended, or is about to."""
        if worker in self._started[side]:
            self._started[side].remove(worker)


class TurnWorker:
    """A worker that is called in its side's turns."""

    def __init__(self, worker: Worker, turns: Turns, side: str) -> None:
        self.worker = worker
        self.name = worker.name
        self._turns = turns
        self._side = side

    async def address(self) -> str:
        """Where its machine is reached; asleep it answers as well."""
        return await self.worker.address()

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method in a turn; ``stop`` at once."""
        if method == "stop":
            self._turns.left(self.worker, self._side)
            return await self.worker.call(method, *args)
        async with self._turns.turn(self._side):
            result = await self.worker.call(method, *args)
            if method == "start":
                self._turns.joined(self.worker, self._side)
            return result

    async def call_split(self, method: str, *args: Any) -> tuple[Handle, Any]:
        """Call a method that returns (data, scalars) in a turn."""
        async with self._turns.turn(self._side):
            return await self.worker.call_split(method, *args)
