"""Clients of generators and of the stateless roles: which process a call goes to."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from rlhf_ray.cluster.workers import Worker, arriving
from rlhf_ray.roles import GeneratorProcess, ReferenceProcess, ScorerProcess
from rlhf_ray.types import (
    AdapterUpdate,
    Handle,
    RawScores,
    ServedAdapter,
    Shard,
    ShardRequest,
    TokenRows,
)


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
