"""The rollouts of a batch: generated, scored, and sampled from the policy.

A shard beyond the mismatch bound is no divergence but a faulty generator: that is replaced, and the
shard's positions are sampled again. Only a fault that stays ends the run.

With `ppo.max_staleness` further batches are generated while one is learnt. Reward sources and the
reference answer as shards arrive; what the learners say of a batch they say just before it is
learnt, as they then are.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from rlhf_ray.driver.guards import Alarm
from rlhf_ray.driver.mismatch import Mismatched, MismatchGuard
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.roles import Roles
from rlhf_ray.types import (
    AdapterUpdate,
    Handle,
    Mismatch,
    RawScores,
    ScoredShard,
    Shard,
    ShardRequest,
    TokenRows,
)


class _OfShard(Protocol):
    @property
    def shard(self) -> Shard: ...


OfShardT = TypeVar("OfShardT", bound=_OfShard)


@dataclass(frozen=True, slots=True)
class _Arrived:
    """A shard, and what the roles that never change say of it."""

    shard: Shard
    raw_scores: RawScores
    ref_logprobs: Handle[TokenRows]


_Judged = tuple[tuple[Handle[TokenRows], Mismatch], Handle[TokenRows] | None]
"""What the learners say of a shard: log-probs with their mismatch, and values."""


class Rollouts:
    """Generates and scores the rollouts of a run."""

    def __init__(
        self,
        roles: Roles,
        guard: MismatchGuard,
        recorder: Recorder,
        warn: Callable[[int, Alarm], None],
        max_staleness: int = 0,
    ) -> None:
        """
        Args:
            roles: those of the run.
            guard: bounds the mismatch of each shard.
            recorder: of the run.
            warn: records and prints a warning about an iteration.
            max_staleness: number of batches that are generated ahead of the one that is learnt.
        """
        self._roles = roles
        self._guard = guard
        self._recorder = recorder
        self._warn = warn
        self._max_staleness = max_staleness
        self._ahead: dict[int, asyncio.Task[list[_Arrived]]] = {}
        """Batches that are being generated while another one is learnt, by iteration."""
        self._published: dict[int, AdapterUpdate] = {}
        """The adapters that samples may be from, by version."""

    async def publish(self, update: AdapterUpdate) -> None:
        """Have generators sample with the learners' adapter from their next shard on.

        Raises:
            WeightSyncError: no generator serves it.
        """
        is_first, self._published[update.version] = not self._published, update
        self._published.pop(update.version - self._max_staleness - 1, None)
        beside = self._max_staleness > 0 and not is_first
        await self._roles.generators.publish(update, beside=beside)

    def begin(self, requests: Sequence[ShardRequest], iteration: int) -> None:
        """Begin to generate the batch of an iteration, which `sample` then takes."""
        arriving = self._each(requests, self._arrive, lambda _: nullcontext(), or_newer=True)
        self._ahead[iteration] = asyncio.ensure_future(arriving)

    async def close(self) -> None:
        """End what is generated ahead."""
        for task in self._ahead.values():
            task.cancel()
        await asyncio.gather(*self._ahead.values(), return_exceptions=True)

    async def sample(
        self, requests: Sequence[ShardRequest], iteration: int, *, is_refill: bool = False
    ) -> list[ScoredShard]:
        """Return a batch in prompt order; what is not sampled from the policy is replaced once.

        Args:
            requests: those of the batch.
            iteration: which learns it.
            is_refill: whether they are a part for which the rest waits: it is sampled with the
                current version, before what is generated ahead.

        Raises:
            WeightSyncError: no generator is at fault: all of several have the same, or it comes
                back with the same positions.
        """
        batch = await self._score_each(requests, iteration, is_refill)
        # Before learning: a batch of another policy than the learner's would poison the commit.
        found = self._guard.find(batch)
        if found is None:
            return batch
        generators, began_s = self._roles.generators, time.monotonic()
        ready = {status.name for status in generators.statuses() if status.state == "ready"}
        if len(ready) > 1 and ready <= found.generators:
            raise found.error
        if self._max_staleness:  # then a few of a generator's shards stand for all
            theirs = [scored for scored in batch if scored.shard.generator in found.generators]
            found = replace(found, shards=theirs)
        generators.replace(found.generators, found.error)
        self._warn(iteration, _replaced(found))
        indices = {scored.shard.info.index for scored in found.shards}
        again = [request for request in requests if request.index in indices]
        fresh = await self._score_each(again, iteration, is_refill)
        self._recorder.outages.lost("generator", "mismatch", time.monotonic() - began_s)
        by_index = {scored.shard.info.index: scored for scored in [*batch, *fresh]}
        batch = [by_index[scored.shard.info.index] for scored in batch]
        self._guard.check(batch)
        return batch

    async def _compared(self, batch: Sequence[ScoredShard]) -> list[ScoredShard]:
        """Return shards with the mismatch to the version that sampled them.

        That to the learners' own version is known. To compare an older one, they have to take its
        adapter: they do so for one shard of each generator and version.
        """
        newest = max(self._published)
        compared, seen = list[ScoredShard](), set[tuple[str, int]]()
        for scored in batch:
            version = scored.shard.info.versions[0]
            if version == newest or version not in self._published:  # the ledger refuses that
                compared.append(scored)
                continue
            mismatch = Mismatch(0.0, 0.0, num_tokens=0)
            if (key := (scored.shard.generator, version)) not in seen:
                seen.add(key)
                found = await self._roles.policy.compare(self._published[version], scored.shard)
                num_tokens = sum(scored.shard.info.response_lengths)
                mismatch = Mismatch(found.error, found.largest, num_tokens)
            compared.append(replace(scored, mismatch=mismatch))
        return compared

    async def _score_each(
        self, requests: Sequence[ShardRequest], iteration: int, is_refill: bool
    ) -> list[ScoredShard]:
        """Generate and score shards, unless that has begun; return them in prompt order."""

        def phase(name: str) -> AbstractContextManager[None]:
            return self._recorder.phase(name, iteration)

        if is_refill or not self._max_staleness:
            return await self._each(requests, self._score, phase)
        if iteration not in self._ahead:  # what is sampled again
            self.begin(requests, iteration)
        with phase("gen"), self._roles.generators.awaited():
            arrived = await self._ahead.pop(iteration)
        with phase("score"):
            batch = await asyncio.gather(*(self._complete(each) for each in arrived))
            return await self._compared(batch)

    async def _each(
        self,
        requests: Sequence[ShardRequest],
        take_in: Callable[[Shard], Coroutine[Any, Any, OfShardT]],
        phase: Callable[[str], AbstractContextManager[None]],
        *,
        or_newer: bool = False,
    ) -> list[OfShardT]:
        """Generate shards, taking in each as it arrives; return them in prompt order."""
        taken_in: list[asyncio.Task[OfShardT]] = []
        try:
            with phase("gen"):
                async for shard in self._roles.generators.generate(requests, or_newer=or_newer):
                    taken_in.append(asyncio.ensure_future(take_in(shard)))
            with phase("score"):
                # Not order of arrival: results must not depend on generators' speeds.
                return sorted(await asyncio.gather(*taken_in), key=lambda s: s.shard.info.index)
        except BaseException:
            for task in taken_in:
                task.cancel()
            await asyncio.gather(*taken_in, return_exceptions=True)
            raise

    async def _score(self, shard: Shard) -> ScoredShard:
        arriving, judged = self._arrive(shard), self._judged(shard)
        return _joined(*await asyncio.gather(arriving, judged))

    async def _complete(self, arrived: _Arrived) -> ScoredShard:
        return _joined(arrived, await self._judged(arrived.shard))

    async def _arrive(self, shard: Shard) -> _Arrived:
        scores, logprobs = self._roles.scorer.score(shard), self._roles.reference.logprobs(shard)
        return _Arrived(shard, *await asyncio.gather(scores, logprobs))

    async def _judged(self, shard: Shard) -> _Judged:
        logprobs, values = self._roles.policy.logprobs(shard), self._values(shard)
        return await asyncio.gather(logprobs, values)

    async def _values(self, shard: Shard) -> Handle[TokenRows] | None:
        return await self._roles.critic.values(shard) if self._roles.critic else None


def _joined(arrived: _Arrived, judged: _Judged) -> ScoredShard:
    (old_logprobs, mismatch), values = judged
    return ScoredShard(
        shard=arrived.shard,
        raw_scores=arrived.raw_scores,
        old_logprobs=old_logprobs,
        ref_logprobs=arrived.ref_logprobs,
        values=values,
        mismatch=mismatch,
    )


def _replaced(found: Mismatched) -> Alarm:
    num_samples = sum(len(scored.shard.info.positions) for scored in found.shards)
    largest = max(scored.mismatch.mean for scored in found.shards)
    return Alarm(
        "mismatch",
        "replace",
        {"shards": len(found.shards), "samples": num_samples, "mismatch": largest},
        f"{found.error}. {' and '.join(sorted(found.generators))}: proved again and replaced; "
        f"{num_samples} samples are sampled again under the same seeds. If it comes back with "
        "them, the run ends",
    )
