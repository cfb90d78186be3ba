"""The policy's losses.

Statistics are detached fp32 scalars over the given tensors alone: sums over the mask divided by
this mask's own count (`ratio_max` is a maximum). To combine micro-batches or ranks, weight each
by its number of real tokens. The losses divide by `num_tokens` instead, so that micro-batches of
one mini-batch simply add up, whatever the length of their responses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_ray.algorithms.whitening import (
    count,
    masked_mean,
    masked_sum,
    require_same_shape,
    zero_padding,
)
from rlhf_ray.config.algorithms import POLICY_LOSSES
from rlhf_ray.plugins import load_function

Stats = dict[str, Tensor]

MAX_LOG_RATIO = 20.0
"""Bound of the log-ratio, nats: an infinite ratio makes a clipped token's zero gradient NaN."""


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    num_tokens: Tensor | float | None = None,
) -> tuple[Tensor, Stats]:
    """Compute the clipped policy-gradient loss: a sum over real tokens divided by `num_tokens`.

        ratio = exp(logprob - old logprob)
        L_t   = max(-A * ratio, -A * clamp(ratio, 1 - clip_low, 1 + clip_high))
        L_t   = min(L_t, -A * dual_clip)      where A < 0, if dual_clip is given

    Sources: PPO, Schulman et al. 2017 (arXiv:1707.06347) eq. 7; dual clip, Ye et al. 2019
    (arXiv:1912.09729) eq. 5; unequal bounds, Yu et al. 2025 (arXiv:2503.14476) section 3.1.

    Args:
        logprobs: `_BT` nats, of the policy being updated; carries the gradient.
        old_logprobs: `_BT` nats, of the policy before the update.
        advantages: `_BT`, without gradient.
        mask: `_BT`, 1 on real tokens; elsewhere nothing matters, NaN included.
        clip_low: ratios are clipped below 1 - clip_low; inf disables it.
        clip_high: ratios are clipped above 1 + clip_high; inf disables it.
        dual_clip: > 1; bounds the loss of bad tokens whose ratio ran away.
        weights: `_BT`, factors of each token's loss (`correction`).
        num_tokens: denominator, default `mask.sum()`; with accumulation or several ranks the
            mini-batch's whole count divided by the number of ranks.

    Returns:
        The loss (fp32 scalar) and `clipfrac` (share of tokens where the clip binds), `approxkl`
        (half the mean squared log-ratio), `policykl` (mean of old - new), `ratio` (mean),
        `ratio_max`.
    """
    require_same_shape(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        weights=weights,
    )
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}: below, it inverts the clip")
    log_ratio = zero_padding(logprobs, mask) - zero_padding(old_logprobs, mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = zero_padding(advantages, mask)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        bounded = torch.minimum(losses, -advantages * dual_clip)
        losses = torch.where(advantages < 0, bounded, losses)
    if weights is not None:
        losses = losses * zero_padding(weights, mask)
    loss = masked_sum(losses, mask) / (count(mask) if num_tokens is None else num_tokens)
    with torch.no_grad():
        stats = {
            "clipfrac": masked_mean(clipped > unclipped, mask),
            "approxkl": masked_mean(log_ratio.square(), mask) / 2,
            "policykl": masked_mean(-log_ratio, mask),
            "ratio": masked_mean(ratio, mask),
            "ratio_max": zero_padding(ratio, mask).max(),
        }
    return loss, stats


def resolve_policy_loss(name: str) -> Callable[..., tuple[Tensor, Stats]]:
    """Return the loss that ``ppo.policy_loss`` names: `policy_loss`, or one with its signature.

    Raises:
        ConfigError: the user's function cannot be imported.
    """
    return load_function(POLICY_LOSSES.get(name, name), "ppo.policy_loss")
