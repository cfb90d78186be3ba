"""A batch as a whole: its prompts and seeds, and the step that learns from it.

Prompts and seeds are functions of the run's seed and the iteration alone.
"""

import asyncio
import hashlib
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from rlhf_ray.algorithms.advantages import resolve
from rlhf_ray.algorithms.whitening import Moments
from rlhf_ray.config import Config
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.driver.ledger import Draw
from rlhf_ray.errors import DataLost
from rlhf_ray.roles import LearnerGroup
from rlhf_ray.types import (
    AssembledStats,
    Prompt,
    SampleRequest,
    ScoredShard,
    ShardRequest,
    StepReport,
)

T = TypeVar("T")


def derive_seed(*parts: int | str) -> int:
    """Derive a 31-bit seed from what identifies a sample, never from the generator it goes to."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") & 0x7FFF_FFFF


class PromptCursor:
    """An endless sequence of prompts: passes over the dataset, each shuffled by (seed, pass)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of prompts in a pass."""
        return len(self._prompts)

    def take(self, first: int, count: int) -> list[Prompt]:
        """Return ``count`` prompts of the endless sequence, from number ``first`` on."""
        size = len(self._prompts)
        orders: dict[int, np.ndarray] = {}
        taken: list[Prompt] = []
        for number in range(first, first + count):
            which = number // size
            if which not in orders:
                orders[which] = np.random.default_rng([self._seed, which]).permutation(size)
            taken.append(self._prompts[int(orders[which][number % size])])
        return taken


def sample_requests(
    prompts: Sequence[Prompt], samples_per_prompt: int, *seed_parts: int | str
) -> list[SampleRequest]:
    """Make one request per sample, the samples of a prompt next to each other.

    Group estimators (RLOO, GRPO) rely on this order.
    """
    return [
        SampleRequest(position, prompt, derive_seed(*seed_parts, position))
        for position, prompt in enumerate(
            prompt for prompt in prompts for _ in range(samples_per_prompt)
        )
    ]


def shard_requests(
    samples: Sequence[SampleRequest], shard_size: int, version: int
) -> list[ShardRequest]:
    """Cut a batch into shards of consecutive positions; the last may be shorter."""
    return [
        ShardRequest(index, tuple(samples[first : first + shard_size]), version)
        for index, first in enumerate(range(0, len(samples), shard_size))
    ]


def draw_requests(draw: Draw, cursor: PromptCursor, config: Config) -> list[ShardRequest]:
    """Make the requests of a drawn batch; the same ones each time that it is asked for."""
    prompts = cursor.take(draw.first_prompt, draw.num_prompts)
    samples = sample_requests(prompts, config.ppo.samples_per_prompt, config.run.seed, draw.batch)
    return shard_requests(samples, config.rollout.shard_size, draw.version)


def whitens(ppo: PpoConfig) -> bool:
    """Return whether advantages are whitened over the batch."""
    chosen = ppo.whiten_advantages
    return resolve(ppo.advantage).whitened if chosen is None else chosen


async def learn_from(
    batch: Sequence[ScoredShard],
    learners: Mapping[str, LearnerGroup],
    kl_coef: float,
    ppo: PpoConfig,
    iteration: int,
    *,
    whitened: bool,
) -> tuple[AssembledStats, dict[str, StepReport]]:
    """Assemble, whiten over the whole batch, learn; all groups at the same time.

    In the first ``ppo.critic_warmup`` iterations the policy does not learn.

    Returns:
        Sums over the batch, and the report of each group that learnt.
    """
    stats, *_ = await _all([group.assemble(batch, kl_coef) for group in learners.values()])
    if iteration <= ppo.critic_warmup:
        learners = {name: group for name, group in learners.items() if name != "policy"}
    moments = Moments(stats.num_tokens, stats.advantage_total, stats.advantage_total_sq)
    largest = max(abs(score) for scored in batch for score in scored.scores)
    whitening = (moments.mean, moments.std(size=largest)) if whitened else (0.0, 1.0)
    reports = await _all([group.learn(*whitening, iteration) for group in learners.values()])
    return stats, dict(zip(learners, reports, strict=True))


async def _all(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Make the calls of all groups; where one lost its data, the others end before it is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except DataLost:  # then all groups go back to the last commit: none may change itself after it
        await asyncio.wait(tasks)
        raise
