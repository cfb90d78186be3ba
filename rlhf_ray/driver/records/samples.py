"""The records of an iteration's first samples: texts and scores, and numbers of each token.

The driver brings the rows of these samples alone, and assembles them once more, because the
learners keep their advantages. A group estimator compares the responses of a prompt: advantages are
recorded of prompts whose responses are all among the samples.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch

from rlhf_ray.algorithms.experience import Assembler, Collected
from rlhf_ray.algorithms.whitening import whiten
from rlhf_ray.config import Config
from rlhf_ray.driver.batches import whitening
from rlhf_ray.driver.metrics import joined
from rlhf_ray.rewards.combine import raw_sums
from rlhf_ray.roles import Fetch
from rlhf_ray.types import AssembledStats, Handle, RawScores, Rollout, ScoredShard, TokenRows

DIGITS = 4
"""Significant digits of a token's recorded numbers."""


@dataclass(frozen=True)
class _Samples:
    """The recorded samples of a batch, in its order."""

    rollouts: Sequence[Rollout]
    old_logprobs: TokenRows
    ref_logprobs: TokenRows
    values: TokenRows | None
    raw_scores: RawScores
    """Of each source, [N]."""
    scores: Sequence[float]
    """[N] combined scores, which were learnt from."""


class SampleRecords:
    """Makes the records that ``run.record`` asks for."""

    def __init__(
        self, config: Config, fetch: Fetch, token_text: Callable[[int], str], *, whitened: bool
    ) -> None:
        """
        Args:
            config: of the run.
            fetch: brings data to the driver.
            token_text: returns the text of a token's id.
            whitened: whether advantages are whitened over the batch.
        """
        self._config = config
        self._wanted = config.run.record
        self._fetch = fetch
        self._token_text = cache(token_text)
        self._assemble = Assembler.of(config.ppo, config.rollout.max_tokens)
        self._is_whitened = whitened

    async def of(
        self,
        iteration: int,
        batch: Sequence[ScoredShard],
        stats: AssembledStats,
        kl_coef: float,
    ) -> list[dict[str, Any]]:
        """Return a record for each of an iteration's first samples, as JSON takes them.

        Args:
            iteration: of the batch.
            batch: in prompt order.
            stats: sums over the whole batch.
            kl_coef: weight of the KL penalty in its token rewards.

        Raises:
            DataLost: the rows are lost; the batch was learnt all the same.
        """
        if not self._wanted.samples:
            return []
        found = await self._first(batch)
        sums = raw_sums(self._config.rewards, found.raw_scores)
        records = [_record(found, row, iteration, sums[row]) for row in range(len(found.rollouts))]
        advantages = self._advantages(found, kl_coef, whitening(batch, stats))
        for row, record in enumerate(records[: self._wanted.tokens]):
            rollout, old = found.rollouts[row], found.old_logprobs[row]
            ids = [int(token) for token in rollout.response_ids]
            record["tokens"] = {
                "ids": ids,
                "texts": [self._token_text(token) for token in ids],
                "advantage": _rounded(advantages[row]) if row < len(advantages) else None,
                "kl": _rounded(old - found.ref_logprobs[row]),
                "mismatch": _rounded(rollout.rollout_logprobs - old),
            }
        return records

    async def _first(self, batch: Sequence[ScoredShard]) -> _Samples:
        """Bring the first samples of a batch to the driver."""
        num = self._wanted.samples
        sizes = [len(scored.shard.info.positions) for scored in batch]
        begins = [0, *accumulate(sizes)][: len(batch)]
        shards = [scored for scored, begin in zip(batch, begins, strict=True) if begin < num]

        async def column(handles: Sequence[Handle[list[Any]]]) -> list[Any]:
            parts = await asyncio.gather(*map(self._fetch, handles))
            return list(chain.from_iterable(parts))[:num]

        values = [scored.values for scored in shards if scored.values is not None]
        rollouts, old_logprobs, ref_logprobs, value_rows = await asyncio.gather(
            column([scored.shard.rollouts for scored in shards]),
            column([scored.old_logprobs for scored in shards]),
            column([scored.ref_logprobs for scored in shards]),
            column(values if self._wanted.tokens else []),
        )
        raw = joined([scored.raw_scores for scored in shards])
        return _Samples(
            rollouts=rollouts,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            values=value_rows or None,
            raw_scores={name: scores[:num] for name, scores in raw.items()},
            scores=[score for scored in shards for score in scored.scores][:num],
        )

    def _advantages(
        self, found: _Samples, kl_coef: float, moments: tuple[float, float]
    ) -> list[np.ndarray]:
        """Return the advantages, as learnt from, of the first samples whose tokens are recorded."""
        group = self._assemble.group_size
        wanted = -(-self._wanted.tokens // group) * group
        num = min(wanted, len(found.rollouts) // group * group)
        if not num:
            return []
        rollouts = found.rollouts[:num]
        experience = self._assemble(
            Collected(
                sequences=[rollout.sequence_ids for rollout in rollouts],
                prompt_lengths=[len(rollout.prompt.token_ids) for rollout in rollouts],
                responses=[rollout.response_ids for rollout in rollouts],
                rollout_logprobs=[rollout.rollout_logprobs for rollout in rollouts],
                old_logprobs=found.old_logprobs[:num],
                ref_logprobs=found.ref_logprobs[:num],
                values=found.values[:num] if found.values else None,
                scores_B=torch.tensor(found.scores[:num]),
                cut_off=[rollout.finish_reason == "length" for rollout in rollouts],
            ),
            kl_coef,
        ).experience
        advantages_BT = experience.advantages_BT
        if self._is_whitened:
            advantages_BT = whiten(advantages_BT, experience.mask_BT, *moments)
        lengths = [len(rollout.response_ids) for rollout in rollouts]
        return [
            row_T[:length].numpy() for row_T, length in zip(advantages_BT, lengths, strict=True)
        ]


def _record(found: _Samples, row: int, iteration: int, score: float | None) -> dict[str, Any]:
    rollout = found.rollouts[row]
    old, ref = found.old_logprobs[row], found.ref_logprobs[row]
    mismatch = np.abs(rollout.rollout_logprobs - old)
    return {
        "iteration": iteration,
        "version": rollout.version,
        "position": rollout.position,
        "prompt_id": rollout.prompt.id,
        "prompt": rollout.prompt.text,
        "response": rollout.text,
        "score": score,
        "scores": {name: scores[row] for name, scores in found.raw_scores.items()},
        "kl": float((old - ref).sum(dtype=np.float64)),
        "mismatch": float(mismatch.mean(dtype=np.float64)) if len(mismatch) else 0.0,
        "distinct_bigrams": rollout.distinct_bigrams,
        "length": len(rollout.response_ids),
        "finish_reason": rollout.finish_reason,
    }


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
