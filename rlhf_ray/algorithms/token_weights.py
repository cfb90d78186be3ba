"""The weights of a batch's tokens in the policy's loss."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.correction import (
    correction_metrics,
    mask_within,
    truncated_importance_weights,
)
from rlhf_ray.algorithms.experience import Experience
from rlhf_ray.algorithms.whitening import count, masked_sum, require_same_shape, zero_padding
from rlhf_ray.config.ppo import PpoConfig

Aggregation = Literal["token_mean", "sequence_mean", "dr_grpo"]


@dataclass(frozen=True)
class WeightedExperience(Experience):
    """A batch that the policy learns from."""

    weights_BT: Tensor
    """Weight of each token in every term of the loss (`aggregation_weights`); 0 on padding."""
    importance_BT: Tensor
    """Weight of each token besides, in the term of the advantages (`correction`); 0 on padding."""

    def weighted_sum(self, values_BT: Tensor) -> Tensor:
        """Sum over the tokens by their weights: fp32 scalar, differentiable."""
        return masked_sum(values_BT * self.weights_BT, self.mask_BT)


def weighted(
    batch: Experience, ppo: PpoConfig, max_tokens: int
) -> tuple[WeightedExperience, dict[str, float]]:
    """Weigh a batch's tokens; its mini-batches are consecutive rows.

    Args:
        batch: all of its rows.
        ppo: the config.
        max_tokens: length limit of responses.

    Returns:
        The batch, and the metrics of its correction; none if there is none.
    """
    mask_BT, size = batch.mask_BT, ppo.mini_batch_size
    logprobs = (batch.old_logprobs_BT, batch.rollout_logprobs_BT, mask_BT)
    importance_BT, kept_BT = mask_BT.float(), mask_BT
    if ppo.importance_cap is not None:
        importance_BT = truncated_importance_weights(
            *logprobs, ppo.importance_cap, ppo.importance_level
        )
    if (bounds := ppo.importance_mask) is not None:
        kept_BT = mask_within(*logprobs, bounds.level, bounds.low, bounds.high)
    metrics = correction_metrics(importance_BT, kept_BT, mask_BT) if ppo.is_corrected else {}
    weights = [
        aggregation_weights(
            mask_BT[first : first + size],
            kept_BT[first : first + size],
            ppo.loss_aggregation,
            max_tokens,
        )
        for first in range(0, len(mask_BT), size)
    ]
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    whole = WeightedExperience(**fields, weights_BT=torch.cat(weights), importance_BT=importance_BT)
    return whole, metrics


def aggregation_weights(
    mask_BT: Tensor, kept_BT: Tensor, how: Aggregation, max_tokens: int
) -> Tensor:
    """Return the weights under which a mini-batch's mean over tokens becomes another mean.

    With N real tokens, K of them kept, K_b of them in row b, and R rows with any, a token that is
    kept weighs

        token_mean      N / K                     every token the same
        sequence_mean   N / (R * K_b)             every response the same
        dr_grpo         N / (R * max_tokens)      every token the same in every mini-batch

    and another one 0. Divided by N the weights add up to 1, 1 and the mean length over max_tokens.
    A weight is that of the whole mini-batch, so its micro-batches and ranks still add up.

    Sources: token_mean, DAPO, Yu et al. 2025 (arXiv:2503.14476) section 3.3; sequence_mean, GRPO,
    Shao et al. 2024 (arXiv:2402.03300) eq. 3; dr_grpo, Liu et al. 2025 (arXiv:2503.20783)
    section 3.2.

    Args:
        mask_BT: all rows of the mini-batch, 1 on real tokens.
        kept_BT: 1 on those that take part in the loss.
        how: the mean.
        max_tokens: length limit of responses.

    Returns:
        fp32 `_BT`, 0 on padding; all zeros if nothing is kept.
    """
    require_same_shape(mask_BT=mask_BT, kept_BT=kept_BT)
    kept_BT = kept_BT.bool() & mask_BT.bool()
    kept_B1 = kept_BT.sum(1, keepdim=True)
    num_rows = count(kept_B1)
    denominators = {
        "token_mean": count(kept_BT),
        "sequence_mean": num_rows * kept_B1.clamp(min=1),
        "dr_grpo": num_rows * max_tokens,
    }
    return zero_padding((count(mask_BT) / denominators[how]).expand(mask_BT.shape), kept_BT)
