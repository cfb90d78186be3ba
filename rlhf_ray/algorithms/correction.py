"""The correction of samples for the mismatch between the engine's log-probs and the learner's.

Engine and learner give the same token slightly different probabilities: other kernels, other
precision, an older version. Weights remove that bias, and a cap bounds the variance that they add;
masks leave out where the two are too far apart for a weight to help.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.whitening import (
    count,
    masked_mean,
    masked_sum,
    require_same_shape,
    zero_padding,
)

Level = Literal["token", "sequence", "geometric"]


def truncated_importance_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    cap: float,
    level: Level = "token",
) -> Tensor:
    """Compute each token's weight for `losses.policy_loss`: min(ratio, cap).

    The ratio is `log_ratios`' of the level. Sources: Ionides 2008, "Truncated Importance Sampling";
    for engines, by token, Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"; by sequence, Liu et al. 2025, "When Speed Kills Stability: Demystifying
    RL Collapse from the Training-Inference Mismatch".

    Args:
        old_logprobs: `_BT` nats, of the learner before the update.
        rollout_logprobs: `_BT` nats, of the engine that sampled.
        mask: `_BT`, 1 on real tokens; padding may hold anything.
        cap: largest weight, > 0, usually 2.
        level: what has a weight of its own.

    Returns:
        fp32 `_BT`, detached (a constant of the loss), 0 on padding.

    Raises:
        ValueError: shapes that differ, or a cap not above 0.
    """
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}")
    ratios = log_ratios(old_logprobs, rollout_logprobs, mask, level)
    return zero_padding(ratios.exp().clamp(max=cap), mask)


def mask_within(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    level: Level,
    low: float,
    high: float,
) -> Tensor:
    """Mark the tokens to learn from: those whose ratio, of the level, is in [low, high].

    With the level token this is IcePop's mask (Ling Team 2025, "Every Step Evolves",
    arXiv:2510.18855); with sequence and geometric, masked importance sampling by whole responses
    (Liu et al. 2025, as above).

    Args:
        old_logprobs: `_BT` nats, of the learner before the update.
        rollout_logprobs: `_BT` nats, of the engine that sampled.
        mask: `_BT`, 1 on real tokens; padding may hold anything.
        level: what is left out as a whole.
        low: smallest ratio that is kept; 0 keeps all small ones.
        high: largest ratio that is kept.

    Returns:
        bool `_BT`, False on padding.
    """
    ratios = log_ratios(old_logprobs, rollout_logprobs, mask, level)
    smallest = math.log(low) if low > 0 else -math.inf
    return mask.bool() & (ratios >= smallest) & (ratios <= math.log(high))


@torch.no_grad()
def log_ratios(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, level: Level
) -> Tensor:
    """Return the logarithm of learner over engine for each token, by one of three levels.

        token       d_t = old - rollout
        sequence    sum of d over the response's tokens: the ratio of the whole response
        geometric   mean of d over them, which doesn't grow with the length

    Returns:
        fp32 `_BT`; the tokens of a response have the same number but with the level token.
    """
    require_same_shape(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    ratios = zero_padding(old_logprobs, mask) - zero_padding(rollout_logprobs, mask)
    if level == "token":
        return ratios
    totals = ratios.sum(-1, keepdim=True)
    if level == "geometric":
        totals = totals / mask.bool().sum(-1, keepdim=True).clamp(min=1)
    return totals.expand(mask.shape)


def correction_metrics(weights: Tensor, kept: Tensor, mask: Tensor) -> dict[str, float]:
    """Return how much a correction changes a batch, by registered metric.

    The effective sample size is Kish's, (sum of w)^2 / sum of w^2, as a share of the tokens, where
    w is the weight, or 0 where the token is masked.

    Args:
        weights: `_BT`, of `truncated_importance_weights`, or 1.
        kept: `_BT`, of `mask_within`, or the mask.
        mask: `_BT`, 1 on real tokens.
    """
    effective = zero_padding(weights, kept)
    squares = float(masked_sum(effective.square(), mask))
    total = float(masked_sum(effective, mask))
    return {
        "sampler/weight_mean": float(masked_mean(effective, mask)),
        "sampler/masked_share": 1 - float(masked_mean(kept.float(), mask)),
        "sampler/ess_share": total**2 / squares / float(count(mask)) if squares else 0.0,
    }
