"""From what every role said of a batch to an experience that can be learnt from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_ray.algorithms.estimators import Estimator
from rlhf_ray.algorithms.experience import Experience, pad
from rlhf_ray.algorithms.kl import KLKind, kl_estimate
from rlhf_ray.algorithms.masking import zero_padding
from rlhf_ray.algorithms.rewards import ScorePosition, score_position, token_rewards

if TYPE_CHECKING:
    import numpy as np

    Rows = Sequence[np.ndarray]


@dataclass(frozen=True)
class Collected:
    """What every role said of a batch, a row a response."""

    sequences: "Rows"
    """[S] token ids of each prompt and its response."""
    prompt_lengths: Sequence[int]
    """Number of prompt tokens of each."""
    responses: "Rows"
    """[T] token ids of each response."""
    rollout_logprobs: "Rows"
    """[T] by the engine."""
    old_logprobs: "Rows"
    """[T] by the learner."""
    ref_logprobs: "Rows"
    """[T] by the reference."""
    values: "Rows | None"
    """[T] or, with the position `first_pad`, [T + 1] by the critic; None without one."""
    scores_B: Tensor
    """Score of each response."""


@dataclass(frozen=True)
class Assembled:
    """A batch in order of its positions."""

    experience: Experience
    """Advantages not whitened; zeros for values and returns where there is no critic."""
    rewards_BT: Tensor
    """Reward of each token; with `first_pad` the score may stand one behind the last."""
    value_mask_BT: Tensor
    """Where the critic has something to learn: the mask, and where a score stands behind it."""


@dataclass(frozen=True)
class Assembler:
    """How token rewards and advantages are made."""

    estimator: Estimator
    gamma: float
    lam: float
    group_size: int
    """Rows that answer one prompt."""
    kl_kind: KLKind
    kl_in: Literal["reward", "loss"]
    """reward: the penalty is part of the token rewards; loss: it is not."""
    position: ScorePosition
    max_tokens: int
    """Longest response: behind one of that length there is no position left."""

    def __call__(self, batch: Collected, kl_coef: float) -> Assembled:
        """Token rewards and advantages of a whole batch.

        Args:
            batch: rows of one prompt next to each other.
            kl_coef: weight of the KL penalty.
        """
        sequences_BS, attention_BS = pad(batch.sequences)
        responses_BT, mask_BT = pad(batch.responses)
        width = self._width(mask_BT.shape[1])
        responses_BT, mask_BT = _fit(responses_BT, width), _fit(mask_BT, width)
        rows = (batch.rollout_logprobs, batch.old_logprobs, batch.ref_logprobs)
        engine_BT, old_BT, ref_BT = (_fit(pad(part)[0], width) for part in rows)
        values_BT = torch.zeros_like(old_BT)
        if batch.values is not None:
            values_BT = _fit(pad(batch.values)[0], width)
        value_mask_BT = mask_BT | score_position(mask_BT, self.position)
        kl_BT = kl_estimate(old_BT, ref_BT, self.kl_kind)
        penalty = kl_coef if self.kl_in == "reward" else 0.0
        rewards_BT = token_rewards(batch.scores_B, kl_BT, mask_BT, penalty, self.position)
        advantages_BT = self._advantages(rewards_BT, value_mask_BT, values_BT)
        has_critic = self.estimator.needs_critic
        returns_BT = advantages_BT + values_BT if has_critic else torch.zeros_like(values_BT)
        experience = Experience(
            sequences_BS=sequences_BS,
            attention_BS=attention_BS,
            prompt_lengths_B=torch.tensor(batch.prompt_lengths),
            responses_BT=responses_BT,
            mask_BT=mask_BT,
            rollout_logprobs_BT=engine_BT,
            old_logprobs_BT=old_BT,
            ref_logprobs_BT=ref_BT,
            values_BT=values_BT,
            advantages_BT=zero_padding(advantages_BT, mask_BT),
            returns_BT=zero_padding(returns_BT, value_mask_BT),
        )
        return Assembled(experience, rewards_BT, value_mask_BT)

    def _advantages(self, rewards_BT: Tensor, mask_BT: Tensor, values_BT: Tensor) -> Tensor:
        return self.estimator(
            rewards_BT,
            mask_BT,
            values_BT=values_BT,
            group_size=self.group_size,
            gamma=self.gamma,
            lam=self.lam,
        )

    def _width(self, longest: int) -> int:
        room_behind = self.position == "first_pad" and longest < self.max_tokens
        return longest + 1 if room_behind else longest


def _fit(rows_BT: Tensor, width: int) -> Tensor:
    return F.pad(rows_BT, (0, width - rows_BT.shape[1]))  # a negative number cuts
