"""The roles of `rlhf_ray.roles` over workers: who of a group is called, and what is passed."""

import asyncio
import inspect
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any, Protocol

from rlhf_ray.observability.metrics import metric
from rlhf_ray.types import (
    AdapterUpdate,
    AssembledStats,
    Gap,
    Handle,
    ProbeComparison,
    RawScores,
    SampleRequest,
    ScoredShard,
    ServedAdapter,
    Shard,
    ShardRequest,
    StepReport,
)

LOOPBACK = "127.0.0.1"

OnCall = Callable[[str, str, float, float], None]
"""(worker, method, start, end in Unix seconds), after each call."""


class Worker(Protocol):
    """A process of a role."""

    name: str

    async def address(self) -> str:
        """Where the machine of this process is reached by others of its group."""
        ...

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method and bring its result. Handles among ``args`` arrive as data."""
        ...

    async def call_split(self, method: str, *args: Any) -> tuple[Handle, Any]:
        """Call a method that returns (data, scalars); the data stays away, the scalars come."""
        ...


class InlineWorker:
    """A role in this process: no Ray, no deadline, calls one after the other."""

    def __init__(self, name: str, instance: Any, on_call: OnCall) -> None:
        self.name = name
        self._instance = instance
        self._on_call = on_call

    async def address(self) -> str:
        """This machine, by loopback."""
        return LOOPBACK

    async def call(self, method: str, *args: Any) -> Any:
        """Call the method here and now."""
        started = time.time()
        result = getattr(self._instance, method)(*args)
        if inspect.isawaitable(result):
            result = await result
        self._on_call(self.name, method, started, time.time())
        return result

    async def call_split(self, method: str, *args: Any) -> tuple[Handle, Any]:
        """The data is its own handle."""
        data, scalars = await self.call(method, *args)
        return data, scalars


class GeneratorClient:
    """One generator."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.name = worker.name

    async def generate(self, request: ShardRequest) -> Shard:
        """Sample a shard; its rollouts stay in the object store."""
        rollouts, info = await self.worker.call_split("generate", request)
        return Shard(info, rollouts)

    async def publish(self, update: AdapterUpdate) -> ServedAdapter:
        """Serve an adapter; its bytes go straight from where they are."""
        return await self.worker.call("publish", replace(update, tensors=None), update.tensors)


class _RoundRobin:
    """Calls the workers of a stateless role in turn."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._next = itertools.cycle(workers)

    def next(self) -> Worker:
        return next(self._next)


class ScorerClient:
    """Reward scorers."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = _RoundRobin(workers)

    async def score(self, shard: Shard) -> RawScores:
        """Raw score of each response from every source."""
        return await self._workers.next().call("score", shard.rollouts)


class ReferenceClient:
    """Frozen references."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = _RoundRobin(workers)

    async def logprobs(self, shard: Shard) -> Handle:
        """List of [T] log-probs."""
        handle, _ = await self._workers.next().call_split("logprobs", shard.rollouts)
        return handle


class LearnerGroupClient:
    """The ranks of a learner group.

    What one rank can answer goes to the ranks in turn; at ZeRO stage 3 no rank has the weights
    alone, so all compute it and the first one's answer counts.
    """

    def __init__(self, ranks: Sequence[Worker], zero_stage: int) -> None:
        self._ranks = ranks
        self._sharded = zero_stage == 3
        self._turn = _RoundRobin(ranks)

    async def _all(self, method: str, *args: Any) -> list[Any]:
        return list(await asyncio.gather(*(rank.call(method, *args) for rank in self._ranks)))

    async def _all_split(self, method: str, *args: Any) -> tuple[Handle, Any]:
        results = await asyncio.gather(*(rank.call_split(method, *args) for rank in self._ranks))
        return results[0]

    async def _any_split(self, method: str, *args: Any) -> tuple[Handle, Any]:
        if self._sharded:
            return await self._all_split(method, *args)
        return await self._turn.next().call_split(method, *args)

    async def assemble(self, batch: Sequence[ScoredShard], kl_coef: float) -> AssembledStats:
        """Every rank gets the whole batch and keeps its rows."""
        stats = await self._all(
            "assemble",
            kl_coef,
            [scored.scores for scored in batch],
            *(scored.shard.rollouts for scored in batch),
            *(scored.old_logprobs for scored in batch),
            *(scored.ref_logprobs for scored in batch),
            *(scored.values for scored in batch),
        )
        return reduce(add, stats)

    async def learn(self, advantage_mean: float, advantage_std: float) -> StepReport:
        """All epochs on all ranks."""
        return merge_reports(await self._all("learn", advantage_mean, advantage_std))

    async def state(self) -> Handle:
        """Files of the group's state."""
        handle, _ = await self._all_split("state")
        return handle

    async def load(self, state: Handle) -> None:
        """Go back to a state."""
        await self._all("load", state)


class PolicyClient(LearnerGroupClient):
    """The policy's ranks."""

    async def logprobs(self, shard: Shard) -> tuple[Handle, Gap]:
        """List of [T] log-probs, and the gap to the engine's."""
        return await self._any_split("logprobs", shard.rollouts)

    async def ref_logprobs(self, shard: Shard) -> Handle:
        """List of [T] log-probs with the adapter off."""
        handle, _ = await self._any_split("ref_logprobs", shard.rollouts)
        return handle

    async def sample_kl(self, shard: Shard, ref_logprobs: Handle) -> tuple[float, ...]:
        """[N] KL of each sample."""
        return (await self._all("sample_kl", shard.rollouts, ref_logprobs))[0]

    async def adapter(self, version: int) -> AdapterUpdate:
        """The current adapter."""
        return await self._update("adapter", version)

    async def zero_adapter(self, version: int) -> AdapterUpdate:
        """An adapter that changes nothing."""
        return await self._update("zero_adapter", version)

    async def probe(self, version: int, canaries: Sequence[SampleRequest]) -> AdapterUpdate:
        """An adapter that moves the canaries."""
        return await self._update("probe", version, canaries)

    async def _update(self, method: str, *args: Any) -> AdapterUpdate:
        tensors, update = await self._all_split(method, *args)
        return replace(update, tensors=tensors)

    async def compare(self, update: AdapterUpdate, shard: Shard) -> ProbeComparison:
        """Engine against learner on a shard sampled under an adapter."""
        known = replace(update, tensors=None)
        return (await self._all("compare", known, update.tensors, shard.rollouts))[0]


class PolicyBaseClient:
    """The reference, where it is the policy's base with the adapter off."""

    def __init__(self, policy: PolicyClient) -> None:
        self._policy = policy

    async def logprobs(self, shard: Shard) -> Handle:
        """List of [T] log-probs."""
        return await self._policy.ref_logprobs(shard)


class CriticClient(LearnerGroupClient):
    """The critic's ranks."""

    async def values(self, shard: Shard) -> Handle:
        """List of [T] values."""
        handle, _ = await self._any_split("values", shard.rollouts)
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
