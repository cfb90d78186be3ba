"""The policy's losses.

A loss takes and returns what `policy_loss` does. Statistics are detached fp32 scalars over the
given tensors alone: sums over the mask divided by this mask's own count (`ratio_max` is a maximum).
To combine micro-batches or ranks, weight each by its number of real tokens. The losses divide by
`num_tokens` instead, so that micro-batches of one mini-batch simply add up, whatever the length of
their responses.
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
    log_ratio = _log_ratio(mask, logprobs, old_logprobs, advantages, weights)
    ratio = _exp(log_ratio)
    advantages = zero_padding(advantages, mask)
    losses, is_clipped = _clipped(ratio, advantages, clip_low, clip_high, dual_clip)
    return (
        _mean(losses, mask, weights, num_tokens),
        _statistics(log_ratio, is_clipped, mask),
    )


def gspo_loss(
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
    """Compute `policy_loss` with one ratio for a whole response, so that it is clipped as a whole.

        s   = exp(mean over the response's tokens of logprob - old logprob)
        s_t = sg(s) * exp(logprob - sg(logprob))      sg: without gradient

    s_t has the value of s and the gradient of its own token, so that tokens may have advantages of
    their own; where those of a response are equal, and ``ppo.loss_aggregation`` is sequence_mean,
    the gradient is that of s. Its logarithm is a mean, so it moves far less than a token's ratio:
    the clip range must be smaller, 3e-4 and 4e-4 in the paper.

    Source: GSPO and GSPO-token, Zheng et al. 2025 (arXiv:2507.18071) eqs. 5, 7, 13 and 14.

    Arguments and result are those of `policy_loss`; the statistics are of the tokens' own ratios.
    """
    log_ratio = _log_ratio(mask, logprobs, old_logprobs, advantages, weights)
    lengths = mask.bool().sum(-1, keepdim=True).clamp(min=1)
    means = (log_ratio.detach().sum(-1, keepdim=True) / lengths).expand(mask.shape)
    ratio = _exp(means + _gradient_of(logprobs, mask))
    advantages = zero_padding(advantages, mask)
    losses, is_clipped = _clipped(ratio, advantages, clip_low, clip_high, dual_clip)
    return (
        _mean(losses, mask, weights, num_tokens),
        _statistics(log_ratio, is_clipped, mask),
    )


def cispo_loss(
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
    """Compute the policy gradient with clipped ratios as constant weights; every token has one.

        L_t = -A * sg(clamp(ratio, 1 - clip_low, 1 + clip_high)) * exp(logprob - sg(logprob))

    The gradient is that of the paper's -A * sg(clamp(ratio)) * logprob. The value is another one,
    on purpose: -A at a ratio of 1, as that of the other losses, and comparable between iterations.

    Source: CISPO, MiniMax 2025 (arXiv:2506.13585) eqs. 4 and 5, which has no lower bound
    (clip_low 1).

    Arguments and result are those of `policy_loss`, but there is no dual clip: the ratio of a bad
    token is bounded as well.
    """
    if dual_clip is not None:
        raise ValueError(f"dual_clip {dual_clip} has no effect: cispo bounds every ratio")
    log_ratio = _log_ratio(mask, logprobs, old_logprobs, advantages, weights)
    ratio = _exp(log_ratio.detach())
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = -zero_padding(advantages, mask) * clipped * _gradient_of(logprobs, mask).exp()
    return (
        _mean(losses, mask, weights, num_tokens),
        _statistics(log_ratio, clipped != ratio, mask),
    )


def _log_ratio(
    mask: Tensor, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, weights: Tensor | None
) -> Tensor:
    require_same_shape(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        weights=weights,
    )
    return zero_padding(logprobs, mask) - zero_padding(old_logprobs, mask)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _gradient_of(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return zeros that have the gradient of the log-probs."""
    own = zero_padding(logprobs, mask)
    return own - own.detach()


def _clipped(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return each token's clipped loss, and where the clip binds."""
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}: below, it inverts the clip")
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        bounded = torch.minimum(losses, -advantages * dual_clip)
        losses = torch.where(advantages < 0, bounded, losses)
    return losses, clipped > unclipped


def _mean(
    losses: Tensor, mask: Tensor, weights: Tensor | None, num_tokens: Tensor | float | None
) -> Tensor:
    if weights is not None:
        losses = losses * zero_padding(weights, mask)
    return masked_sum(losses, mask) / (count(mask) if num_tokens is None else num_tokens)


@torch.no_grad()
def _statistics(log_ratio: Tensor, is_clipped: Tensor, mask: Tensor) -> Stats:
    ratio = _exp(log_ratio)
    return {
        "clipfrac": masked_mean(is_clipped, mask),
        "approxkl": masked_mean(log_ratio.square(), mask) / 2,
        "policykl": masked_mean(-log_ratio, mask),
        "ratio": masked_mean(ratio, mask),
        "ratio_max": zero_padding(ratio, mask).max(),
    }


def resolve_policy_loss(name: str) -> Callable[..., tuple[Tensor, Stats]]:
    """Return the loss that ``ppo.policy_loss`` names: `policy_loss`, or one with its signature.

    Raises:
        ConfigError: the user's function cannot be imported.
    """
    return load_function(POLICY_LOSSES.get(name, name), "ppo.policy_loss")
