"""A batch as a whole: its prompts and seeds, its refills, and the step that learns from it.

Prompts and seeds are functions of the run's seed, the iteration and what was filtered before.
"""

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch

from rlhf_ray.algorithms.advantages import equal_groups, resolve
from rlhf_ray.algorithms.rewards import length_penalty
from rlhf_ray.algorithms.whitening import Moments
from rlhf_ray.config import Config
from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.data.datasets.drawn_prompts import DrawnPrompts
from rlhf_ray.driver.checkpoint import PlainMoments
from rlhf_ray.driver.guards import Alarm
from rlhf_ray.driver.ledger import Draw, Ledger
from rlhf_ray.driver.metrics import joined, with_scores
from rlhf_ray.driver.rollouts import Rollouts
from rlhf_ray.errors import DataLost
from rlhf_ray.rewards.combine import raw_sums
from rlhf_ray.roles import LearnerGroup
from rlhf_ray.types import (
    AssembledStats,
    Prompt,
    RawScores,
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
    """An endless sequence of prompts: passes over the dataset, each shuffled by (seed, pass).

    The first pass over drawn prompts is in the order of their draw, so it renders only what it
    takes.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of prompts in a pass."""
        return len(self._prompts)

    def take(self, numbers: Sequence[int]) -> list[Prompt]:
        """Return prompts of the endless sequence, by their numbers.

        Of drawn prompts, those that the next call of this kind would take are rendered meanwhile.
        """
        orders: dict[int, np.ndarray] = {}
        taken: list[Prompt] = []
        for number in numbers:
            drawn = self._prompts
            if isinstance(drawn, DrawnPrompts) and number < drawn.reach(number + 1):
                taken.append(drawn[number])
                continue
            size = len(self._prompts)
            which = number // size
            if which not in orders:
                orders[which] = np.random.default_rng([self._seed, which]).permutation(size)
            taken.append(self._prompts[int(orders[which][number % size])])
        if isinstance(self._prompts, DrawnPrompts):
            self._prompts.render_ahead(max(numbers, default=-1) + 1 + len(numbers))
        return taken


def sample_requests(
    prompts: Sequence[Prompt], samples_per_prompt: int, *seed_parts: int | str, first: int = 0
) -> list[SampleRequest]:
    """Make one request per sample, the samples of a prompt next to each other.

    Group estimators (RLOO, GRPO) rely on this order. ``first`` is the first position.
    """
    return [
        SampleRequest(position, prompt, derive_seed(*seed_parts, position))
        for position, prompt in enumerate(
            (prompt for prompt in prompts for _ in range(samples_per_prompt)), first
        )
    ]


def shard_requests(
    samples: Sequence[SampleRequest], shard_size: int, version: int, first: int = 0
) -> list[ShardRequest]:
    """Cut a batch into shards of consecutive positions; the last may be shorter.

    ``first`` is the index of the first shard.
    """
    return [
        ShardRequest(index, tuple(samples[start : start + shard_size]), version)
        for index, start in enumerate(range(0, len(samples), shard_size), first)
    ]


@dataclass(frozen=True)
class ScoredBatch:
    """A batch that is ready to be learnt."""

    shards: list[ScoredShard]
    """Its rollouts, in prompt order."""
    reward_moments: PlainMoments
    """Moments of the reward sources, to commit with it."""
    metrics: Mapping[str, float]
    """Metrics of its refills; empty where none are allowed."""


class Batches:
    """Has batches sampled and scored, and the prompts replaced that would teach nothing.

    These are prompts whose responses all score the same, the KL penalty left out: compared with
    each other, as group estimators do, none of them is better. Each refill draws exactly as many
    prompts as it replaces, so a batch keeps its size and nothing is sampled that isn't needed.
    Source: DAPO's dynamic sampling, Yu et al. 2025 (arXiv:2503.14476) section 3.2.
    """

    def __init__(
        self,
        config: Config,
        rollouts: Rollouts,
        ledger: Ledger,
        cursor: PromptCursor,
        warn: Callable[[int, Alarm], None],
    ) -> None:
        """
        Args:
            config: the run's.
            rollouts: those of the run.
            ledger: of the run; each refill is drawn from it.
            cursor: brings the prompts.
            warn: records and prints a warning about an iteration.
        """
        self._config = config
        self._rollouts = rollouts
        self._ledger = ledger
        self._cursor = cursor
        self._warn = warn
        self._max_refills = config.ppo.filter_groups.max_refills

    def requests(self, draw: Draw) -> list[ShardRequest]:
        """Make the requests of a drawn batch; the same ones each time that it is asked for."""
        return self._requests(draw, 0, draw.version)

    async def scored(self, draw: Draw, version: int, moments: PlainMoments) -> ScoredBatch:
        """Sample and score a batch, and refill it until no prompt is left to replace.

        A batch is judged as it would be learnt: each time as a whole, from the same moments.

        Args:
            draw: the batch; the ledger has it refilled afterwards.
            version: the current one, which samples the refills.
            moments: the committed ones of the reward sources.
        """
        draw = self._ledger.empty(draw)  # it may be sampled again
        batch = await self._rollouts.sample(self.requests(draw), draw.batch)
        raw, num_refills = [scored.raw_scores for scored in batch], 0
        while True:
            self._ledger.arrived(draw, [scored.shard.info for scored in batch])
            batch, new_moments = self._combined(batch, moments)
            equal = self._equal(batch)
            if not equal or num_refills == self._max_refills:
                break
            num_refills, first = num_refills + 1, draw.num_samples
            draw = self._ledger.refill(draw, equal)
            requests = self._requests(draw, first, version)
            fresh = await self._rollouts.sample(requests, draw.batch, is_refill=True)
            kept = [scored for scored in batch if scored.shard.info.positions[0] not in equal]
            batch = [*kept, *fresh]
            raw += [scored.raw_scores for scored in fresh]
        if equal:
            self._warn(draw.batch, self._used_up(draw, len(equal)))
        metrics = self._metrics(draw, raw, len(equal), num_refills)
        return ScoredBatch(batch, new_moments, metrics)

    def _requests(self, draw: Draw, first: int, version: int) -> list[ShardRequest]:
        config, num, size = self._config, draw.samples_per_prompt, self._config.rollout.shard_size
        prompts = self._cursor.take(draw.prompts[first // num :])
        samples = sample_requests(prompts, num, config.run.seed, draw.batch, first=first)
        return shard_requests(samples, size, version, first // size)

    def _combined(
        self, batch: Sequence[ScoredShard], moments: PlainMoments
    ) -> tuple[list[ScoredShard], PlainMoments]:
        ppo, max_tokens = self._config.ppo, self._config.rollout.max_tokens
        of_length = partial(length_penalty, ppo.overlong, max_tokens)
        sources = self._config.rewards
        return with_scores(batch, sources, moments, ppo.missing_eos_penalty, of_length)

    def _equal(self, batch: Sequence[ScoredShard]) -> set[int]:
        """Return the positions whose prompts' responses all score the same."""
        if not self._max_refills:
            return set()
        num = self._config.ppo.samples_per_prompt
        scores = torch.tensor([score for each in batch for score in each.scores])
        positions = [position for each in batch for position in each.shard.info.positions]
        equal = equal_groups(scores, num)
        return {position for row, position in enumerate(positions) if equal[row // num]}

    def _metrics(
        self, draw: Draw, raw: Sequence[RawScores], num_equal: int, num_refills: int
    ) -> dict[str, float]:
        if not self._max_refills:
            return {}
        sums = raw_sums(self._config.rewards, joined(raw))
        return {
            "filter/prompts": float(len(draw.prompts)),
            "filter/replaced": len(draw.filtered) / draw.samples_per_prompt,
            "filter/equal_share": (len(draw.filtered) + num_equal) / draw.num_samples,
            "filter/refills": float(num_refills),
            "filter/scores": fmean(score for score in sums if score is not None),
        }

    def _used_up(self, draw: Draw, num_equal: int) -> Alarm:
        num, num_left = draw.samples_per_prompt, num_equal // draw.samples_per_prompt
        return Alarm(
            "filter_groups",
            "learn it",
            {"prompts": len(draw.prompts), "equal": num_left, "refills": self._max_refills},
            f"ppo.filter_groups.max_refills {self._max_refills} is used up, and prompts whose "
            f"{num} responses all score the same are left, {num_left} of {draw.num_kept // num}; "
            "the batch is learnt with them. They may be too easy or too hard for the policy, or "
            "the reward too coarse: raise the limit, or begin a new run with other prompts or more "
            "responses to each",
        )


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
    moments = whitening(batch, stats) if whitened else (0.0, 1.0)
    reports = await _all([group.learn(*moments, iteration) for group in learners.values()])
    return stats, dict(zip(learners, reports, strict=True))


def whitening(batch: Sequence[ScoredShard], stats: AssembledStats) -> tuple[float, float]:
    """Return mean and standard deviation of a batch's advantages, by which they are whitened."""
    moments = Moments(stats.num_tokens, stats.advantage_total, stats.advantage_total_sq)
    largest = max(abs(score) for scored in batch for score in scored.scores)
    return moments.mean, moments.std(size=largest)


async def _all(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Make the calls of all groups; where one lost its data, the others end before it is raised."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    except DataLost:  # then all groups go back to the last commit: none may change itself after it
        await asyncio.wait(tasks)
        raise
