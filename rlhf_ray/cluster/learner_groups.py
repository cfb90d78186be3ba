"""Clients of the learner groups: which of their ranks a call goes to."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain
from operator import add
from typing import Any, Generic, TypeVar, cast

from rlhf_ray.cluster.role_clients import Restarts
from rlhf_ray.cluster.workers import DataT, Method, P, ResultT, ScalarsT, Worker, arriving
from rlhf_ray.errors import ActorFailure, DataLost
from rlhf_ray.observability.metrics import metric
from rlhf_ray.placement.bundles import role_of
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
    """The ranks of a learner group, which live and die together.

    A call that one rank can answer goes to the ranks in rotation. At ZeRO stage 3 no rank has all
    weights, so all ranks compute, and the first one's answer is used.

    Where a rank fails, the others hang in collectives or hold what nobody can continue. So all are
    ended and started again, they load the last state that the driver has of them, make the calls
    again that changed them since, and then the failed call.
    """

    def __init__(
        self,
        ranks: Sequence[Worker[LearnerT_co]],
        zero_stage: int,
        restarts: Restarts | None = None,
    ) -> None:
        """
        Args:
            ranks: not started.
            zero_stage: of the group.
            restarts: replaces the ranks; None: a failure is the caller's.
        """
        self._role = role_of(ranks[0].name)
        self._ranks = ranks
        self._sharded = zero_stage == 3
        self._turn = itertools.count()
        self._restarts = restarts
        self._restoring = asyncio.Lock()
        self._num_restored = 0
        self._lost: Exception | None = None
        """Why the group was not restored, if that happened."""
        self._state: Handle[StateFiles] | None = None
        """The last state that it exported or loaded; None: the one in which it starts."""
        self._since: list[tuple[Any, tuple[Any, ...]]] = []
        """Methods that have changed it since, with their arguments."""

    async def start(self: "LearnerGroupClient[LearnerProcess]") -> None:
        """Start every rank."""
        try:
            await _start(self._ranks)
        except ActorFailure as failure:
            await self._restore(0, failure)

    @property
    def is_committed(self) -> bool:
        """Whether nothing has to be done again after a restore."""
        return not self._since

    async def _surely(self, operation: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Carry out an operation, if a rank fails again on the restored group."""
        while True:
            num_restored = self._num_restored
            try:
                result = await operation()
            except DataLost:
                raise
            except ActorFailure as failure:
                await self._restore(num_restored, failure)
                continue
            if self._restarts is not None:
                self._restarts.worked(self._role)
            return result

    async def _restore(self, num_restored: int, failure: ActorFailure) -> None:
        """Restore the group, unless another failed operation has done so meanwhile."""
        restarts = self._restarts
        if restarts is None:
            raise failure
        async with self._restoring:
            if self._lost is not None:
                raise self._lost
            if num_restored != self._num_restored:
                return
            try:
                self._ranks = await restarts.again(
                    self._role, failure, self._restored_ranks, is_waited_for=True
                )
            except DataLost:  # of a batch that was learnt since: without it there is a way back
                raise
            except Exception as error:  # what follows would find the same
                self._lost = error
                raise
            self._num_restored += 1

    async def _restored_ranks(self) -> Sequence[Worker[LearnerT_co]]:
        assert self._restarts is not None
        ranks = await self._restarts.renew(self._ranks)
        await _start(ranks)
        while True:
            state, since = self._state, self._since
            if state is not None:
                await _on_all(ranks, LearnerProcess.load, arriving(state))
            for method, args in since:
                await _on_all(ranks, method, *args)
            # An export that the failure did not touch may have ended meanwhile, and emptied it.
            if self._since is since:
                return ranks

    async def _all(
        self, method: Method[LearnerT_co, P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> list[ResultT]:
        return await self._surely(lambda: _on_all(self._ranks, method, *args, **kwargs))

    async def _all_split(
        self,
        method: Method[LearnerT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[tuple[Handle[DataT], ScalarsT]]:
        calls = (rank.call_split(method, *args, **kwargs) for rank in self._ranks)
        return list(await asyncio.gather(*calls))

    async def _agreed(
        self,
        method: Method[LearnerT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[Handle[DataT], ScalarsT]:
        """Return what rank 0 sends, it alone data; ranks that disagree are a failed group."""

        async def ask() -> tuple[Handle[DataT], ScalarsT]:
            sent = await self._all_split(method, *args, **kwargs)
            digests = [getattr(scalars, "digest", scalars) for _, scalars in sent]
            if digests.count(digests[0]) < len(digests):
                told = zip(self._ranks, digests, strict=True)
                ranks = ", ".join(f"{rank.name} {digest}" for rank, digest in told)
                raise ActorFailure(f"The adapters of a group's ranks differ, by digest: {ranks}")
            return sent[0]

        return await self._surely(ask)

    async def _any_split(
        self,
        method: Method[LearnerT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[Handle[DataT], ScalarsT]:
        async def ask() -> tuple[Handle[DataT], ScalarsT]:
            if self._sharded:
                return (await self._all_split(method, *args, **kwargs))[0]
            rank = self._ranks[next(self._turn) % len(self._ranks)]
            return await rank.call_split(method, *args, **kwargs)

        return await self._surely(ask)

    async def _changed_by(
        self, method: Method[LearnerT_co, P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> list[ResultT]:
        """Call a method of all ranks that must be called again after a restore."""
        results = await self._all(method, *args, **kwargs)
        self._since.append((method, args))
        return results

    def _keep(self, state: Handle[StateFiles]) -> None:
        """Restore this state from now on."""
        self._state, self._since = state, []

    async def assemble(self, batch: Sequence[ScoredShard], kl_coef: float) -> AssembledStats:
        """Send every rank the whole batch; each keeps its rows."""
        stats = await self._changed_by(
            LearnerProcess.assemble,
            kl_coef,
            [scored.scores for scored in batch],
            *(arriving(scored.shard.rollouts) for scored in batch),
            *(arriving(scored.old_logprobs) for scored in batch),
            *(arriving(scored.ref_logprobs) for scored in batch),
            *(arriving(scored.values) for scored in batch),
        )
        return reduce(add, stats)

    async def learn(
        self, advantage_mean: float, advantage_std: float, iteration: int = 1
    ) -> StepReport:
        """Run all epochs on all ranks."""
        moments = (advantage_mean, advantage_std)
        return merge_reports(await self._changed_by(LearnerProcess.learn, *moments, iteration))

    async def state(self) -> Handle[StateFiles]:
        """Export the group's state: all ranks gather, rank 0 sends the files."""
        handle, _ = await self._agreed(LearnerProcess.state)
        self._keep(handle)
        return handle

    async def load(self, state: Handle[StateFiles] | StateFiles) -> None:
        """Restore a state on every rank."""
        if isinstance(state, Mapping):  # else each rank of each restore would be sent a copy
            state = await self._ranks[0].hold(state)
        self._keep(state)  # what it had learnt is void, also for a restore meanwhile
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

    async def adapter(self, version: int) -> AdapterUpdate:
        """Export the current adapter."""
        return _with_tensors(*await self._agreed(PolicyProcess.adapter, version))

    async def zero_adapter(self, version: int) -> AdapterUpdate:
        """Make an adapter that changes nothing."""
        return _with_tensors(*await self._agreed(PolicyProcess.zero_adapter, version))

    async def probe(self, version: int, prompts: Sequence[SampleRequest]) -> AdapterUpdate:
        """Make an adapter that moves the log-probs of the probe prompts."""
        return _with_tensors(*await self._agreed(PolicyProcess.probe, version, prompts))

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


def _with_tensors(tensors: Handle[bytes], update: AdapterUpdate) -> AdapterUpdate:
    return replace(update, tensors=tensors)


async def _start(ranks: Sequence[Worker[LearnerProcess]]) -> None:
    """Start ranks at once: they meet at the first one."""
    address, port = await ranks[0].address(), await ranks[0].call(LearnerProcess.free_port)
    await asyncio.gather(
        *(
            worker.call(LearnerProcess.start, rank, len(ranks), address, port)
            for rank, worker in enumerate(ranks)
        )
    )


async def _on_all(
    ranks: Sequence[Worker[LearnerT_co]],
    method: Method[LearnerT_co, P, ResultT],
    *args: P.args,
    **kwargs: P.kwargs,
) -> list[ResultT]:
    calls = (rank.call(method, *args, **kwargs) for rank in ranks)
    return list(await asyncio.gather(*calls))


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
