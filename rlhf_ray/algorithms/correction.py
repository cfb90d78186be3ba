"""Importance weights that correct the log-prob mismatch between engine and learner."""

import torch
from torch import Tensor

from rlhf_ray.algorithms.whitening import require_same_shape, zero_padding


def truncated_importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cap: float
) -> Tensor:
    """Compute each token's weight for `losses.policy_loss`: min(exp(old - rollout), cap).

    The engine that sampled and the learner give the same token slightly different probabilities
    (other kernels, other precision, staleness). The weight removes that bias; the cap bounds the
    variance that it adds. Source: Ionides 2008, "Truncated Importance Sampling"; for engines,
    Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".

    Args:
        old_logprobs: `_BT` nats, of the learner before the update.
        rollout_logprobs: `_BT` nats, of the engine that sampled.
        mask: `_BT`, 1 on real tokens; padding may hold anything.
        cap: largest weight, > 0, usually 2.

    Returns:
        fp32 `_BT`, detached (a constant of the loss), 0 on padding.

    Raises:
        ValueError: shapes that differ, or a cap not above 0.
    """
    require_same_shape(old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}")
    with torch.no_grad():
        log_weights = zero_padding(old_logprobs, mask) - zero_padding(rollout_logprobs, mask)
        return zero_padding(log_weights.exp().clamp(max=cap), mask)
