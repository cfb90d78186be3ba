"""The rollouts of a batch: generated, scored, and sampled from the policy.

A shard beyond the mismatch bound is no divergence but a faulty generator: that is replaced, and the
shard's positions are sampled again. Only a fault that stays ends the run.
"""

import asyncio
import time
from collections.abc import Callable, Sequence

from rlhf_ray.driver.guards import Alarm
from rlhf_ray.driver.mismatch import Mismatched, MismatchGuard
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.roles import Roles
from rlhf_ray.types import Handle, ScoredShard, Shard, ShardRequest, TokenRows


class Rollouts:
    """Generates and scores the rollouts of a run."""

    def __init__(
        self,
        roles: Roles,
        guard: MismatchGuard,
        recorder: Recorder,
        warn: Callable[[int, Alarm], None],
    ) -> None:
        """
        Args:
            roles: those of the run.
            guard: bounds the mismatch of each shard.
            recorder: of the run.
            warn: records and prints a warning about an iteration.
        """
        self._roles = roles
        self._guard = guard
        self._recorder = recorder
        self._warn = warn

    async def sample(self, requests: Sequence[ShardRequest], iteration: int) -> list[ScoredShard]:
        """Return a batch in prompt order; what is not sampled from the policy is replaced once.

        Raises:
            WeightSyncError: no generator is at fault: all of several have the same, or it comes
                back with the same positions.
        """
        batch = await self._score_each(requests, iteration)
        # Before learning: a batch of another policy than the learner's would poison the commit.
        found = self._guard.find(batch)
        if found is None:
            return batch
        generators, began_s = self._roles.generators, time.monotonic()
        ready = {status.name for status in generators.statuses() if status.state == "ready"}
        if len(ready) > 1 and ready <= found.generators:
            raise found.error
        generators.replace(found.generators, found.error)
        self._warn(iteration, _replaced(found))
        indices = [scored.shard.info.index for scored in found.shards]
        fresh = await self._score_each([requests[index] for index in indices], iteration)
        self._recorder.outages.lost("generator", "mismatch", time.monotonic() - began_s)
        by_index = {scored.shard.info.index: scored for scored in [*batch, *fresh]}
        batch = [by_index[scored.shard.info.index] for scored in batch]
        self._guard.check(batch)
        return batch

    async def _score_each(
        self, requests: Sequence[ShardRequest], iteration: int
    ) -> list[ScoredShard]:
        """Generate shards, scoring each as it arrives; return them in prompt order."""
        scoring: list[asyncio.Task[ScoredShard]] = []
        try:
            with self._recorder.phase("gen", iteration):
                async for shard in self._roles.generators.generate(requests):
                    scoring.append(asyncio.ensure_future(self._score(shard)))
            with self._recorder.phase("score", iteration):
                # Not order of arrival: results must not depend on generators' speeds.
                return sorted(await asyncio.gather(*scoring), key=lambda s: s.shard.info.index)
        except BaseException:
            for task in scoring:
                task.cancel()
            await asyncio.gather(*scoring, return_exceptions=True)
            raise

    async def _score(self, shard: Shard) -> ScoredShard:
        roles = self._roles
        raw_scores, ref_logprobs, (old_logprobs, mismatch), values = await asyncio.gather(
            roles.scorer.score(shard),
            roles.reference.logprobs(shard),
            roles.policy.logprobs(shard),
            self._values(shard),
        )
        return ScoredShard(shard, raw_scores, old_logprobs, ref_logprobs, values, mismatch)

    async def _values(self, shard: Shard) -> Handle[TokenRows] | None:
        return await self._roles.critic.values(shard) if self._roles.critic else None


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
