"""Held-out evaluation during PPO: the same prompts and seeds at every version."""

import asyncio
from collections.abc import Sequence
from statistics import fmean
from typing import TypedDict

from rlhf_ray.config.rewards import SourceConfig
from rlhf_ray.driver.batches import sample_requests, shard_requests
from rlhf_ray.driver.metrics import mean_score
from rlhf_ray.rewards.combine import raw_sums
from rlhf_ray.roles import Roles
from rlhf_ray.types import Prompt, Shard

TABLE_ROWS = 8

Evaluation = TypedDict(
    "Evaluation",
    {
        "version": int,
        "eval/score": float,
        "eval/kl": float,
        "eval/length": float,
        "samples": list[dict[str, str | float | None]],
    },
)
"""A record of ``eval.jsonl``, without its iteration."""


class Evaluator:
    """Samples the held-out prompts with the served version, and scores the responses."""

    def __init__(
        self, prompts: Sequence[Prompt], sources: Sequence[SourceConfig], shard_size: int, seed: int
    ) -> None:
        self._sources = sources
        self._samples = sample_requests(prompts, 1, seed, "eval")
        self._shard_size = shard_size

    async def evaluate(self, roles: Roles, version: int) -> Evaluation:
        """Return the mean raw score, KL and length, and a table of samples of fixed prompts."""
        requests = shard_requests(self._samples, self._shard_size, version)
        shards = [shard async for shard in roles.generators.generate(requests)]
        shards.sort(key=lambda shard: shard.info.index)
        scored = await asyncio.gather(*(self._score(roles, shard) for shard in shards))
        scores = [score for shard_scores, _ in scored for score in shard_scores]
        table: list[dict[str, str | float | None]] = []
        for shard, (shard_scores, _) in zip(shards, scored, strict=True):
            if len(table) < TABLE_ROWS:
                for rollout, score in zip(
                    await roles.fetch(shard.rollouts), shard_scores, strict=True
                ):
                    table.append(
                        {"prompt": rollout.prompt.text, "response": rollout.text, "score": score}
                    )
        return {
            "version": version,
            "eval/score": mean_score(scores),
            "eval/kl": fmean(kl for _, kls in scored for kl in kls),
            "eval/length": fmean(n for shard in shards for n in shard.info.response_lengths),
            "samples": table[:TABLE_ROWS],
        }

    async def _score(
        self, roles: Roles, shard: Shard
    ) -> tuple[list[float | None], tuple[float, ...]]:
        raw_scores, ref_logprobs = await asyncio.gather(
            roles.scorer.score(shard), roles.reference.logprobs(shard)
        )
        kls = await roles.policy.sample_kl(shard, ref_logprobs)
        return raw_sums(self._sources, raw_scores), kls
