"""Clients of the roles: how a process is called, and which processes of a role a call goes to.

A process is a Ray actor or an object in this process; both are a `Worker`. A method that makes data
for other roles returns ``(data, scalars)``; `Worker.call_split` leaves the data where it is and
brings the scalars.
"""

import asyncio
import inspect
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast

from rlhf_ray.errors import ActorFailure
from rlhf_ray.observability.metrics import metric
from rlhf_ray.roles import (
    CriticProcess,
    GeneratorProcess,
    LearnerProcess,
    PolicyProcess,
    ReferenceProcess,
    ScorerProcess,
)
from rlhf_ray.types import (
    AdapterUpdate,
    AssembledStats,
    Handle,
    Mismatch,
    ProbeComparison,
    RawScores,
    SampleRequest,
    ScoredShard,
    ServedAdapter,
    Shard,
    ShardRequest,
    StateFiles,
    StepReport,
    TokenRows,
)

LOOPBACK = "127.0.0.1"

OnCall = Callable[[str, str, float, float], None]
"""Called after each call with worker, method, start and end (Unix seconds)."""

P = ParamSpec("P")
DataT = TypeVar("DataT")
ScalarsT = TypeVar("ScalarsT")
ResultT = TypeVar("ResultT")
ProcessT_co = TypeVar("ProcessT_co", covariant=True)
LearnerT_co = TypeVar("LearnerT_co", bound=LearnerProcess, covariant=True)

Method = Callable[Concatenate[ProcessT_co, P], Awaitable[ResultT] | ResultT]
"""A method of a process, async or not. Calls name it by the function, never by a string: pyright
then checks the arguments, and that the actor class has it where `stages` makes the client."""


class Worker(Protocol[ProcessT_co]):
    """A process of a role."""

    name: str

    async def address(self) -> str:
        """Return the address under which its group reaches the machine of this process."""
        ...

    async def call(
        self, method: Method[ProcessT_co, P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> ResultT:
        """Call a method and bring its result. Handles among ``args`` arrive as data."""
        ...

    async def call_split(
        self,
        method: Method[ProcessT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[Handle[DataT], ScalarsT]:
        """Call a method that returns (data, scalars); leave the data, bring the scalars."""
        ...


def arriving(handle: Handle[DataT] | DataT) -> DataT:
    """Pass a handle as an argument of a call: Ray puts the data in its place.

    Only top-level arguments are resolved, never handles within a list: hence `Learner.assemble`
    takes its columns one by one.
    """
    return cast("DataT", handle)


async def fetch(handle: Handle[DataT]) -> DataT:
    """Bring data to the driver; inline it is there already."""
    return (
        await cast("Awaitable[DataT]", handle) if inspect.isawaitable(handle) else arriving(handle)
    )


class InlineWorker(Generic[ProcessT_co]):
    """A role in this process: no Ray, calls one after the other.

    What a call awaits has the deadline, such as a service or a user's function. What computes in
    this thread cannot be interrupted.
    """

    def __init__(
        self,
        name: str,
        instance: ProcessT_co,
        on_call: OnCall,
        timeout_s: float | None = None,
    ) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._instance = instance
        self._on_call = on_call

    async def address(self) -> str:
        """Return the loopback address."""
        return LOOPBACK

    async def call(
        self, method: Method[ProcessT_co, P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> ResultT:
        """Call the method here and now."""
        started = time.time()
        # By name: `method` may be a Protocol's, which the instance implements.
        result = getattr(self._instance, method.__name__)(*args, **kwargs)
        if inspect.isawaitable(result):
            deadline = asyncio.timeout(self._timeout_s)
            try:
                async with deadline:
                    result = await result
            except TimeoutError:
                if not deadline.expired():
                    raise
                raise ActorFailure(
                    f"{self.name} did not answer {method.__name__} within {self._timeout_s:g} s "
                    "(cluster.call_timeout_s)"
                ) from None
        self._on_call(self.name, method.__name__, started, time.time())
        return result

    async def call_split(
        self,
        method: Method[ProcessT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[Handle[DataT], ScalarsT]:
        """Call the method; the data is its own handle."""
        data, scalars = await self.call(method, *args, **kwargs)
        return cast("Handle[DataT]", data), scalars


class GeneratorClient:
    """One generator."""

    def __init__(self, worker: Worker[GeneratorProcess]) -> None:
        self.worker = worker
        self.name = worker.name

    async def generate(self, request: ShardRequest) -> Shard:
        """Sample a shard; its rollouts stay in the object store."""
        rollouts, info = await self.worker.call_split(GeneratorProcess.generate, request)
        return Shard(info, rollouts)

    async def publish(self, update: AdapterUpdate) -> ServedAdapter:
        """Serve an adapter; its bytes go straight from the learner's node to the generator's."""
        tensors = cast("Handle[bytes]", update.tensors)
        return await self.worker.call(
            GeneratorProcess.publish, replace(update, tensors=None), arriving(tensors)
        )


class ScorerClient:
    """Reward scorers, called in rotation."""

    def __init__(self, workers: Sequence[Worker[ScorerProcess]]) -> None:
        self._workers = itertools.cycle(workers)

    async def score(self, shard: Shard) -> RawScores:
        """Return the raw score of each response from every source."""
        return await next(self._workers).call(ScorerProcess.score, arriving(shard.rollouts))


class ReferenceClient:
    """Frozen references, called in rotation."""

    def __init__(self, workers: Sequence[Worker[ReferenceProcess]]) -> None:
        self._workers = itertools.cycle(workers)

    async def logprobs(self, shard: Shard) -> Handle[TokenRows]:
        """Compute log-probs."""
        handle, _ = await next(self._workers).call_split(
            ReferenceProcess.logprobs, arriving(shard.rollouts)
        )
        return handle


class LearnerGroupClient(Generic[LearnerT_co]):
    """The ranks of a learner group.

    A call that one rank can answer goes to the ranks in rotation. At ZeRO stage 3 no rank has all
    weights, so all ranks compute, and the first one's answer is used.
    """

    def __init__(self, ranks: Sequence[Worker[LearnerT_co]], zero_stage: int) -> None:
        self._ranks = ranks
        self._sharded = zero_stage == 3
        self._in_turn = itertools.cycle(ranks)

    async def _all(
        self, method: Method[LearnerT_co, P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> list[ResultT]:
        calls = (rank.call(method, *args, **kwargs) for rank in self._ranks)
        return list(await asyncio.gather(*calls))

    async def _all_split(
        self,
        method: Method[LearnerT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[tuple[Handle[DataT], ScalarsT]]:
        calls = (rank.call_split(method, *args, **kwargs) for rank in self._ranks)
        return list(await asyncio.gather(*calls))

    def _rank_0s(
        self, sent: Sequence[tuple[Handle[DataT], ScalarsT]]
    ) -> tuple[Handle[DataT], ScalarsT]:
        """Return what rank 0 sent, it alone data; ranks that disagree are a failed group."""
        digests = [getattr(scalars, "digest", scalars) for _, scalars in sent]
        if digests.count(digests[0]) < len(digests):
            ranks = ", ".join(f"{r.name} {d}" for r, d in zip(self._ranks, digests, strict=True))
            raise ActorFailure(f"The adapters of a group's ranks differ, by digest: {ranks}")
        return sent[0]

    async def _any_split(
        self,
        method: Method[LearnerT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[Handle[DataT], ScalarsT]:
        if self._sharded:
            return (await self._all_split(method, *args, **kwargs))[0]
        return await next(self._in_turn).call_split(method, *args, **kwargs)

    async def assemble(self, batch: Sequence[ScoredShard], kl_coef: float) -> AssembledStats:
        """Send every rank the whole batch; each keeps its rows."""
        stats = await self._all(
            LearnerProcess.assemble,
            kl_coef,
            [scored.scores for scored in batch],
            *(arriving(scored.shard.rollouts) for scored in batch),
            *(arriving(scored.old_logprobs) for scored in batch),
            *(arriving(scored.ref_logprobs) for scored in batch),
            *(arriving(scored.values) for scored in batch),
        )
        return reduce(add, stats)

    async def learn(self, advantage_mean: float, advantage_std: float) -> StepReport:
        """Run all epochs on all ranks."""
        return merge_reports(await self._all(LearnerProcess.learn, advantage_mean, advantage_std))

    async def state(self) -> Handle[StateFiles]:
        """Export the group's state: all ranks gather, rank 0 sends the files."""
        handle, _ = self._rank_0s(await self._all_split(LearnerProcess.state))
        return handle

    async def load(self, state: Handle[StateFiles] | StateFiles) -> None:
        """Restore a state on every rank."""
        await self._all(LearnerProcess.load, arriving(state))


class PolicyClient(LearnerGroupClient[PolicyProcess]):
    """The policy's ranks."""

    async def logprobs(self, shard: Shard) -> tuple[Handle[TokenRows], Mismatch]:
        """Compute log-probs, and the mismatch to the engine's."""
        return await self._any_split(PolicyProcess.logprobs, arriving(shard.rollouts))

    async def ref_logprobs(self, shard: Shard) -> Handle[TokenRows]:
        """Compute log-probs with the adapter off."""
        handle, _ = await self._any_split(PolicyProcess.ref_logprobs, arriving(shard.rollouts))
        return handle

    async def sample_kl(self, shard: Shard, ref_logprobs: Handle[TokenRows]) -> tuple[float, ...]:
        """Return [N] KL of each sample."""
        rollouts = arriving(shard.rollouts)
        return (await self._all(PolicyProcess.sample_kl, rollouts, arriving(ref_logprobs)))[0]

    def _update(self, sent: Sequence[tuple[Handle[bytes], AdapterUpdate]]) -> AdapterUpdate:
        tensors, update = self._rank_0s(sent)
        return replace(update, tensors=tensors)

    async def adapter(self, version: int) -> AdapterUpdate:
        """Export the current adapter."""
        return self._update(await self._all_split(PolicyProcess.adapter, version))

    async def zero_adapter(self, version: int) -> AdapterUpdate:
        """Make an adapter that changes nothing."""
        return self._update(await self._all_split(PolicyProcess.zero_adapter, version))

    async def probe(self, version: int, prompts: Sequence[SampleRequest]) -> AdapterUpdate:
        """Make an adapter that moves the log-probs of the probe prompts."""
        return self._update(await self._all_split(PolicyProcess.probe, version, prompts))

    async def compare(self, update: AdapterUpdate, shard: Shard) -> ProbeComparison:
        """Compare the engine with the learner on a shard sampled under an adapter."""
        tensors, rollouts = cast("Handle[bytes]", update.tensors), arriving(shard.rollouts)
        described = replace(update, tensors=None)
        return (await self._all(PolicyProcess.compare, described, arriving(tensors), rollouts))[0]


class PolicyBaseClient:
    """The reference, where it is the policy's base with the adapter off."""

    def __init__(self, policy: PolicyClient) -> None:
        self._policy = policy

    async def logprobs(self, shard: Shard) -> Handle[TokenRows]:
        """Compute log-probs."""
        return await self._policy.ref_logprobs(shard)


class CriticClient(LearnerGroupClient[CriticProcess]):
    """The critic's ranks."""

    async def values(self, shard: Shard) -> Handle[TokenRows]:
        """Compute values."""
        handle, _ = await self._any_split(CriticProcess.values, arriving(shard.rollouts))
        return handle


def merge_reports(reports: Sequence[StepReport]) -> StepReport:
    """Merge the reports of a group's ranks, each metric by its registered reduction."""
    num_tokens = [report.num_tokens for report in reports]
    return StepReport(
        metrics={
            name: metric(name).reduction.merge(
                [report.metrics[name] for report in reports], num_tokens
            )
            for name in reports[0].metrics
        },
        samples_learnt=sum(report.samples_learnt for report in reports),
        num_tokens=sum(num_tokens),
    )
