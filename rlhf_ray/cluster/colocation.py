"""Generators and learners that share GPUs: one group works while the other sleeps in main memory.

    generate, publish --> [generators]      [learners] <-- score, assemble, learn, state
                                 \\            /
                           one of the two is awake

No caller asks to wake a group. A call to a worker of the sleeping group waits until the awake group
is idle, and then the groups swap. So the loop is the same with and without colocation, and results
are too; scoring just cannot overlap with generation any more.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

from rlhf_ray.cluster.workers import DataT, Method, P, ResultT, ScalarsT, Worker
from rlhf_ray.errors import ActorFailure
from rlhf_ray.roles import Sleeper
from rlhf_ray.types import Handle

COLOCATED_GROUPS: Mapping[str, str] = {
    "generator": "generators",
    "policy": "learners",
    "critic": "learners",
}
"""Role -> its group, if groups share GPUs (placement.turns)."""
POLL_S = 0.01
"""Interval between two checks whether a group may wake."""
GRACE_S = 0.05
"""How long a group must be idle before it is put to sleep: its next call may follow at once, and a
swap takes seconds."""

SleeperT_co = TypeVar("SleeperT_co", bound=Sleeper, covariant=True)


class Colocation:
    """Keeps track of the awake group and its running calls; swaps the groups when it is idle."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._started: dict[str, list[Worker[Sleeper]]] = defaultdict(list)
        self.failures: dict[Worker[Any], ActorFailure] = {}
        """Workers that have failed to fall asleep or wake up."""
        self._awake: str | None = None
        self._under_way = 0
        self._last_end_s = 0.0

    @asynccontextmanager
    async def awake(self, group: str) -> AsyncIterator[None]:
        """Keep a group awake within."""
        # Polled, not signalled: a group may only sleep once it has been idle for GRACE_S.
        while not await self._enter_uncancelled(group):
            await asyncio.sleep(POLL_S)
        try:
            yield
        finally:
            self._under_way -= 1
            self._last_end_s = time.monotonic()

    async def _enter_uncancelled(self, group: str) -> bool:
        # A swap that is cancelled half-way would leave both groups on the GPU, or neither. So it
        # always runs to its end; the call of a cancelled caller is then no longer counted.
        entering = asyncio.ensure_future(self._enter(group))
        try:
            return await asyncio.shield(entering)
        except asyncio.CancelledError:
            entering.add_done_callback(self._leave_if_entered)
            raise

    def _leave_if_entered(self, entering: "asyncio.Future[bool]") -> None:
        if not entering.cancelled() and entering.exception() is None:
            self._under_way -= entering.result()

    async def _enter(self, group: str) -> bool:
        async with self._lock:
            if group != self._awake:
                idle_s = time.monotonic() - self._last_end_s
                if self._under_way or idle_s < GRACE_S:
                    return False
                await self._swap_to(group)
            self._under_way += 1
            return True

    async def _swap_to(self, group: str) -> None:
        # Sleep comes first: the GPU has no memory for both groups. While neither is awake,
        # `_awake` says so, so that a wake that fails is tried again by the next call.
        if self._awake is not None:
            await self._call_all(self._awake, Sleeper.sleep)
            self._awake = None
        await self._call_all(group, Sleeper.wake)
        self._awake = group

    async def _call_all(self, group: str, method: Method[Sleeper, [], None]) -> None:
        workers = [*self._started[group]]
        calls = (worker.call(method) for worker in workers)
        results = await asyncio.gather(*calls, return_exceptions=True)
        for worker, result in zip(workers, results, strict=True):
            if isinstance(result, ActorFailure):
                # A dead process holds no GPU memory. One that lives may be half awake: its next
                # call fails, and whoever called replaces it.
                self.remove(worker, group)
                self.failures[worker] = result
            elif isinstance(result, BaseException):
                raise result

    def add(self, worker: Worker[Sleeper], group: str) -> None:
        """Add a worker that has started, while its group is awake."""
        self._started[group].append(worker)

    def remove(self, worker: Worker[Sleeper], group: str) -> None:
        """Remove a worker that has ended or is about to."""
        self.failures.pop(worker, None)
        if worker in self._started[group]:
            self._started[group].remove(worker)


class ColocatedWorker(Generic[SleeperT_co]):
    """A worker that is only called while its group is awake."""

    def __init__(self, worker: Worker[SleeperT_co], colocation: Colocation, group: str) -> None:
        self.worker = worker
        self.name = worker.name
        self._colocation = colocation
        self._group = group

    async def address(self) -> str:
        """Return the address of its machine, also while it sleeps."""
        return await self.worker.address()

    async def call(
        self, method: Method[SleeperT_co, P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> ResultT:
        """Call a method while the group is awake; ``stop`` at once."""
        if method.__name__ == "stop":
            # A generator that is ended because it hangs must not wait for its group to be idle.
            self.leave()
            return await self.worker.call(method, *args, **kwargs)
        async with self._awake():
            result = await self.worker.call(method, *args, **kwargs)
            if method.__name__ == "start":
                self._colocation.add(self.worker, self._group)
            return result

    async def call_split(
        self,
        method: Method[SleeperT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[Handle[DataT], ScalarsT]:
        """Call a method that returns (data, scalars) while the group is awake."""
        async with self._awake():
            return await self.worker.call_split(method, *args, **kwargs)

    async def hold(self, data: DataT) -> Handle[DataT]:
        """Return a handle to the driver's data, also while it sleeps."""
        return await self.worker.hold(data)

    def leave(self) -> None:
        """Leave its group: its process has ended, or is about to."""
        self._colocation.remove(self.worker, self._group)

    @asynccontextmanager
    async def _awake(self) -> AsyncIterator[None]:
        async with self._colocation.awake(self._group):
            if failure := self._colocation.failures.get(self.worker):
                raise failure
            yield
