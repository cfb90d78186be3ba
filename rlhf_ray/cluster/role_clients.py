"""Clients of generators and of the stateless roles: whom a call goes to, and what if it fails."""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Generic, Protocol, TypeVar, cast

from rlhf_ray.cluster.workers import ProcessT_co, ResultT, Worker, arriving
from rlhf_ray.errors import (
    ActorFailure,
    DataLost,
    LostNodes,
    MemoryFailure,
    NodeLeaves,
    PlacementError,
)
from rlhf_ray.observability.outages import Outages
from rlhf_ray.observability.repeated import GrowingWait
from rlhf_ray.roles import GeneratorProcess, Process, ReferenceProcess, ScorerProcess
from rlhf_ray.types import (
    AdapterUpdate,
    Handle,
    RawScores,
    ServedAdapter,
    Shard,
    ShardRequest,
    TokenRows,
)

RESUMES = "Run again: the run resumes at its last commit"
CAUSES = {
    " did not answer ": "deadline",
    " died during ": "died",
    " differ, ": "ranks differ",
    " leaves the cluster": "moved",
}
"""Words of a failure's message -> what it is counted as; others are counted as ``failed``."""

WorkerT = TypeVar("WorkerT", bound=Worker[Any])


class Renew(Protocol):
    """Ends workers, dead or alive, and spawns others in their places, not started."""

    async def __call__(self, workers: Sequence[WorkerT]) -> list[WorkerT]:
        """Return the new ones, in the same order.

        Raises:
            PlacementError: the cluster has no capacity for them.
        """
        ...


class Restarts:
    """The restarts of one kind of a run's processes: counted, said, and limited in number."""

    def __init__(
        self,
        limit: int,
        key: str,
        renew: Renew,
        say: Callable[[str], None],
        outages: Outages,
        first_wait_s: float = 1.0,
    ) -> None:
        """
        Args:
            limit: number of restarts in all.
            key: the config key that sets it.
            renew: replaces workers.
            say: tells the user of a restart.
            outages: counts it.
            first_wait_s: before a second restart in a row, which nothing that worked has
                interrupted; there is no wait before the first.
        """
        self.renew = renew
        self.say = say
        self._limit = limit
        self._key = key
        self._outages = outages
        self._first_wait_s = first_wait_s
        self._used = 0
        self._lost_nodes = LostNodes()
        self._waits: dict[str, GrowingWait] = {}
        """Who was restarted, and has not worked since."""

    async def again(
        self,
        who: str,
        failure: ActorFailure,
        attempt: Callable[[], Awaitable[ResultT]],
        *,
        is_waited_for: bool,
        may_wait: Callable[[], bool] = lambda: False,
    ) -> ResultT:
        """Attempt a restart until it succeeds.

        Each attempt counts, but for a node that leaves, and those that found no place; a lost node
        counts once, whatever it takes along.

        Args:
            who: what is restarted: a worker, or the role of a group.
            failure: why.
            attempt: restarts it.
            is_waited_for: whether the run stands still meanwhile.
            may_wait: whether it may be without a place for as long as the cluster has none.

        Raises:
            ActorFailure: the restarts are used up, or it lacks memory again.
            PlacementError: it has no place any more, and is needed.
        """
        began_s, cause = time.monotonic(), failure
        self._require_memory(who, cause)
        while True:
            is_free = isinstance(cause, NodeLeaves) or self._lost_nodes.has(cause)
            if self._used >= self._limit and not is_free:
                budget = f"All {self._limit} restarts ({self._key}) are used up"
                raise ActorFailure(f"{_sentence(cause)}. {budget}. {RESUMES}") from cause
            self._used += not is_free
            self._lost_nodes.add(cause)
            await asyncio.sleep(self._next_wait_s(who))
            may_fail = may_wait()  # before: an attempt that is needed has waited for as long as any
            try:
                result = await attempt()
                break
            except DataLost:
                raise
            except ActorFailure as error:
                self._require_memory(who, cause := error)
            except PlacementError as error:
                self._used -= not is_free
                if may_fail:
                    self.say(f"{who} has no place, and is tried again later: {error}")
                    continue
                message = f"{_sentence(failure)}. It cannot be placed again: {_sentence(error)}"
                raise PlacementError(f"{message}. {RESUMES}") from failure
        seconds = time.monotonic() - began_s
        self.say(f"{who} was restarted in {seconds:.0f} s: {failure}")
        role = who.partition("-")[0]
        self._outages.restarted(role, _counted_as(failure), seconds if is_waited_for else 0.0)
        return result

    def worked(self, who: str) -> None:
        """Note that it does its work: a later failure is the first in a row."""
        self._waits.pop(who, None)

    def _require_memory(self, who: str, cause: ActorFailure) -> None:
        if isinstance(cause, MemoryFailure) and who in self._waits:
            raise cause

    def _next_wait_s(self, who: str) -> float:
        if who in self._waits:
            return self._waits[who].next_s()
        self._waits[who] = GrowingWait(self._first_wait_s)
        return 0.0


class Crew(Generic[ProcessT_co]):
    """The workers of a stateless role, each of which can answer any call.

    One that fails is replaced, and its calls go to another one meanwhile, or wait.
    """

    def __init__(
        self, workers: Sequence[Worker[ProcessT_co]], restarts: Restarts | None = None
    ) -> None:
        """
        Args:
            workers: not started.
            restarts: replaces those that fail; None: a failure is the caller's.
        """
        self._first = list(workers)
        self._up = deque(workers)
        self._restarts = restarts
        self._coming: list[asyncio.Task[None]] = []
        self._missing: Exception | None = None
        """Why a worker was not replaced, if that happened."""

    async def start(self: "Crew[Process]") -> None:
        """Start every worker."""
        await asyncio.gather(*map(self._start, self._first))

    async def _start(self: "Crew[Process]", worker: Worker[Process]) -> None:
        try:
            await worker.call(Process.start)
        except ActorFailure as failure:
            if self._restarts is None:
                raise
            self._up.remove(worker)
            await self._replace(worker, failure, lambda: False)

    async def ask(self, call: Callable[[Worker[ProcessT_co]], Awaitable[ResultT]]) -> ResultT:
        """Make a call to the worker whose turn it is, or if that fails to another one."""
        while True:
            worker = await self._next()
            try:
                result = await call(worker)
            except ActorFailure as failure:
                if self._restarts is None or isinstance(failure, DataLost):
                    raise
                self._lose(worker, failure)
                continue
            if self._restarts is not None:
                self._restarts.worked(worker.name)
            return result

    async def close(self) -> None:
        """Replace none any more."""
        for task in self._coming:
            task.cancel()
        await asyncio.gather(*self._coming, return_exceptions=True)

    async def _next(self) -> Worker[ProcessT_co]:
        while not self._up:
            coming = [task for task in self._coming if not task.done()]
            if not coming:
                raise self._missing or ActorFailure("Every worker of this role has ended")
            await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
        self._up.rotate(-1)
        return self._up[-1]

    def _lose(self, worker: Worker[ProcessT_co], failure: ActorFailure) -> None:
        if worker in self._up:  # else another of its calls has failed before
            self._up.remove(worker)
            self._coming.append(asyncio.ensure_future(self._try_to_replace(worker, failure)))

    async def _try_to_replace(self, worker: Any, failure: ActorFailure) -> None:
        try:
            await self._replace(worker, failure, lambda: bool(self._up))
        except Exception as error:  # a constructor raises its libraries' errors
            self._missing = error
            assert self._restarts is not None
            self._restarts.say(f"{worker.name} is not replaced: {error}")

    async def _replace(
        self, worker: Any, failure: ActorFailure, may_wait: Callable[[], bool]
    ) -> None:
        restarts = self._restarts
        assert restarts is not None

        async def renewed() -> Any:
            (new,) = await restarts.renew([worker])
            await new.call(Process.start)
            return new

        is_last = not self._up
        restart = restarts.again(
            worker.name, failure, renewed, is_waited_for=is_last, may_wait=may_wait
        )
        self._up.append(await restart)


class GeneratorClient:
    """One generator."""

    def __init__(self, worker: Worker[GeneratorProcess]) -> None:
        self.worker = worker
        self.name = worker.name

    async def generate(self, request: ShardRequest) -> Shard:
        """Sample a shard; its rollouts stay in the object store."""
        rollouts, info = await self.worker.call_split(GeneratorProcess.generate, request)
        return Shard(info, rollouts, self.name)

    async def publish(self, update: AdapterUpdate) -> ServedAdapter:
        """Serve an adapter; its bytes go straight from the learner's node to the generator's."""
        tensors = cast("Handle[bytes]", update.tensors)
        return await self.worker.call(
            GeneratorProcess.publish, replace(update, tensors=None), arriving(tensors)
        )


class ScorerClient:
    """Reward scorers, called in rotation."""

    def __init__(self, crew: Crew[ScorerProcess]) -> None:
        self._crew = crew

    async def score(self, shard: Shard) -> RawScores:
        """Return the raw score of each response from every source."""
        rollouts = arriving(shard.rollouts)
        return await self._crew.ask(lambda worker: worker.call(ScorerProcess.score, rollouts))


class ReferenceClient:
    """Frozen references, called in rotation."""

    def __init__(self, crew: Crew[ReferenceProcess]) -> None:
        self._crew = crew

    async def logprobs(self, shard: Shard) -> Handle[TokenRows]:
        """Compute log-probs."""
        rollouts = arriving(shard.rollouts)
        handle, _ = await self._crew.ask(
            lambda worker: worker.call_split(ReferenceProcess.logprobs, rollouts)
        )
        return handle


def _sentence(error: Exception) -> str:
    return str(error).rstrip(".")


def _counted_as(failure: ActorFailure) -> str:
    return next((cause for words, cause in CAUSES.items() if words in str(failure)), "failed")
