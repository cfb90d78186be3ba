"""The losses of critic, reward model and DPO; the policy's are in `policy_losses`.

Statistics are detached fp32 scalars over the given tensors alone: sums over the mask divided by
this mask's own count (`ratio_max` is a maximum). To combine micro-batches or ranks, weight each
by its number of real tokens. The losses divide by `num_tokens` instead, so that micro-batches of
one mini-batch simply add up, whatever the length of their responses.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

# `losses.policy_loss` is a name that users' functions import.
from rlhf_ray.algorithms.policy_losses import Stats
from rlhf_ray.algorithms.policy_losses import policy_loss as policy_loss
from rlhf_ray.algorithms.whitening import (
    Moments,
    count,
    masked_mean,
    require_same_shape,
    zero_padding,
)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    num_tokens: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Compute the critic's clipped squared error: a sum over real tokens divided by `num_tokens`.

        L_t = 1/2 max((V - G)^2, (V_clip - G)^2),  V_clip = V_old + clamp(V - V_old, -clip, clip)

    Source: the PPO implementation of OpenAI baselines; Ouyang et al. 2022 (arXiv:2203.02155).

    Args:
        values: `_BT`, of the critic being updated; carries the gradient.
        old_values: `_BT`, of the critic before the update.
        returns: `_BT`, targets (`advantages.gae`).
        mask: `_BT`, 1 on real tokens; elsewhere nothing matters, NaN included.
        clip: in units of value; inf disables it.
        num_tokens: as for `policy_loss`.

    Returns:
        The loss (fp32 scalar) and `clipfrac` (share of tokens where the clip binds),
        `value_mean`, `error` (mean squared error, unclipped).
    """
    require_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    values = zero_padding(values, mask)
    old_values = zero_padding(old_values, mask)
    returns = zero_padding(returns, mask)
    squares = (values - returns).square()
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    clipped_squares = (clipped_values - returns).square()
    total = torch.maximum(squares, clipped_squares).sum() / 2
    loss = total / (count(mask) if num_tokens is None else num_tokens)
    with torch.no_grad():
        stats = {
            "clipfrac": masked_mean(clipped_squares > squares, mask),
            "value_mean": masked_mean(values, mask),
            "error": masked_mean(squares, mask),
        }
    return loss, stats


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - var(returns - values) / var(returns) over the real tokens, in float64.

    NaN where the returns differ by rounding alone. Parts of a batch cannot be merged.
    """
    require_same_shape(values=values, returns=returns, mask=mask)
    targets, guesses = (x[mask.bool()].double() for x in (returns, values))
    deviation = Moments.of(targets, torch.ones_like(targets)).std(unbiased=False)
    error = float((targets - guesses).var(unbiased=False))
    return 1 - error / deviation**2 if deviation else float("nan")


def pairwise_reward_loss(
    chosen_B: Tensor, rejected_B: Tensor, margin: Tensor | float | None = None, centre: float = 0.0
) -> Tensor:
    """Compute the Bradley-Terry loss of a reward model on preference pairs, a mean over them.

        mean(-log sigmoid(chosen - rejected - margin)) + centre * mean((chosen + rejected)^2)

    Sources: Ouyang et al. 2022 (arXiv:2203.02155) eq. 1; margin, Touvron et al. 2023
    (arXiv:2307.09288) eq. 2; centring, Eisenstein et al. 2023 (arXiv:2312.09244).

    Args:
        chosen_B: score of the better answer of each pair.
        rejected_B: score of the worse one.
        margin: score difference by which the better answer should win: `_B` or one number.
        centre: weight of the term that keeps scores near 0.
    """
    margin_B = margin if isinstance(margin, Tensor) else None
    require_same_shape(chosen_B=chosen_B, rejected_B=rejected_B, margin=margin_B)
    chosen_B, rejected_B = chosen_B.float(), rejected_B.float()
    gap_B = chosen_B - rejected_B - (0.0 if margin is None else margin)
    return -F.logsigmoid(gap_B).mean() + centre * (chosen_B + rejected_B).square().mean()


def pointwise_reward_loss(
    scores_B: Tensor, targets_B: Tensor, kind: Literal["bce", "mse"]
) -> Tensor:
    """Compute the loss of a reward model on single answers, a mean over them.

    bce: -t log sigmoid(s) - (1 - t) log sigmoid(-s), t = 1 for a liked answer, else 0
    mse: (s - t)^2, t a rating; scores are then on the scale of the ratings
    """
    require_same_shape(scores_B=scores_B, targets_B=targets_B)
    scores_B, targets_B = scores_B.float(), targets_B.float()
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(scores_B, targets_B)
    return F.mse_loss(scores_B, targets_B)


def dpo_loss(
    chosen_B: Tensor,
    rejected_B: Tensor,
    beta: float,
    kind: Literal["sigmoid", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the loss of direct preference optimisation, a mean over the pairs.

        h = chosen - rejected
        sigmoid: -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)
        ipo:     (h - 1 / (2 beta))^2

    Sources: sigmoid, Rafailov et al. 2023 (arXiv:2305.18290) eq. 7; smoothed by eps for labels
    that are wrong with that probability, Mitchell 2023 (cDPO); ipo, Azar et al. 2023
    (arXiv:2310.12036) eq. 17.

    Args:
        chosen_B: log-ratio of policy to reference of the better answer, nats.
        rejected_B: of the worse one.
        beta: weight of the log-ratios, per nat; a larger one keeps the policy closer to the
            reference.
        kind: the loss to use.
        label_smoothing: eps, in [0, 0.5); used by the sigmoid loss only.
    """
    require_same_shape(chosen_B=chosen_B, rejected_B=rejected_B)
    gap_B = chosen_B.float() - rejected_B.float()
    if kind == "ipo":
        return (gap_B - 1 / (2 * beta)).square().mean()
    if kind != "sigmoid":
        raise ValueError(f"kind must be sigmoid or ipo, got {kind!r}")
    right_B, wrong_B = F.logsigmoid(beta * gap_B), F.logsigmoid(-beta * gap_B)
    return -((1 - label_smoothing) * right_B + label_smoothing * wrong_B).mean()
