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
class PolicyExperience(Experience):
    """A batch that the policy learns from."""

    kept_BT: Tensor
    """1 on the tokens that take part in the loss."""
    importance_BT: Tensor
    """Weight of each token in the term of the advantages (`correction`)."""
    weights_BT: Tensor
    """Weight of each token in every term of the loss (`aggregation_weights`); 0 if not kept."""

    def weighted(self, ppo: PpoConfig, max_tokens: int) -> "PolicyExperience":
        """Return the batch with the weights of its mini-batches, which are consecutive rows.

        Args:
            ppo: the config.
            max_tokens: length limit of responses.
        """
        size = ppo.mini_batch_size
        weights = [
            aggregation_weights(
                self.mask_BT[first : first + size],
                self.kept_BT[first : first + size],
                ppo.loss_aggregation,
                max_tokens,
            )
            for first in range(0, len(self.mask_BT), size)
        ]
        return dataclasses.replace(self, weights_BT=torch.cat(weights))

    def weighted_sum(self, values_BT: Tensor) -> Tensor:
        """Sum over the tokens by their weights: fp32 scalar, differentiable."""
        return masked_sum(values_BT * self.weights_BT, self.mask_BT)


def corrected(
    batch: Experience, ppo: PpoConfig, cut_off_B: Tensor
) -> tuple[PolicyExperience, dict[str, float]]:
    """Correct a batch for the mismatch of engine and learner, and leave out what is cut off.

    Args:
        batch: all of its rows.
        ppo: the config.
        cut_off_B: whether each response was cut off at its limit.

    Returns:
        The batch, without weights of mini-batches, and the metrics of its correction; none if there
        is none.
    """
    mask_BT = batch.mask_BT
    logprobs = (batch.old_logprobs_BT, batch.rollout_logprobs_BT, mask_BT)
    importance_BT, kept_BT = mask_BT.float(), mask_BT.bool()
    if ppo.importance_cap is not None:
        importance_BT = truncated_importance_weights(
            *logprobs, ppo.importance_cap, ppo.importance_level
        )
    if (bounds := ppo.importance_mask) is not None:
        kept_BT = mask_within(*logprobs, bounds.level, bounds.low, bounds.high)
    metrics = correction_metrics(importance_BT, kept_BT, mask_BT) if ppo.is_corrected else {}
    if ppo.overlong.truncated == "mask":
        kept_BT = kept_BT & ~cut_off_B.unsqueeze(1)
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    weights_BT = kept_BT.float()
    return PolicyExperience(
        **fields, kept_BT=kept_BT, importance_BT=importance_BT, weights_BT=weights_BT
    ), metrics


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
