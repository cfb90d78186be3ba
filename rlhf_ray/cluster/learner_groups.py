"""Clients of the learner groups: which of their ranks a call goes to."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain
from operator import add
from typing import Generic, TypeVar, cast

from rlhf_ray.cluster.workers import DataT, Method, P, ResultT, ScalarsT, Worker, arriving
from rlhf_ray.errors import ActorFailure
from rlhf_ray.observability.metrics import metric
from rlhf_ray.roles import CriticProcess, LearnerProcess, PolicyProcess
from rlhf_ray.types import (
    AdapterUpdate,
    AssembledStats,
    Handle,
    Mismatch,
    ProbeComparison,
    SampleRequest,
    ScoredShard,
    Shard,
    StateFiles,
    StepReport,
    TokenRows,
)

LearnerT_co = TypeVar("LearnerT_co", bound=LearnerProcess, covariant=True)


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
        positions=tuple(chain.from_iterable(report.positions for report in reports)),
        num_tokens=sum(num_tokens),
    )
