"""Per-token estimates of KL(policy || reference) from the sampled tokens alone."""

from typing import Literal

import torch
from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, kind: KLKind) -> Tensor:
    """Estimate KL(policy || reference) for each token, in nats, with d = logprob - ref logprob.

        k1 = d               unbiased; single values may be negative
        k2 = d^2 / 2         never negative, biased, small variance
        k3 = e^-d - 1 + d    never negative and unbiased

    The estimates are unbiased only for tokens sampled from the policy itself: if the sampler never
    draws some token that the policy would, the mean of k1 becomes negative.

    Source: J. Schulman, "Approximating KL Divergence", 2020,
    http://joschu.net/blog/kl-approx.html.

    Args:
        logprobs_BT: log-probs of the policy that sampled, nats.
        ref_logprobs_BT: log-probs of the frozen reference, nats, same shape.

    Returns:
        fp32 `_BT`, differentiable in both. Padding is not masked.
    """
    difference_BT = logprobs_BT.float() - ref_logprobs_BT.float()
    if kind == "k1":
        return difference_BT
    if kind == "k2":
        return difference_BT.square() / 2
    if kind == "k3":
        # expm1, because e^-d - 1 in fp32 loses every digit where policy and reference are close.
        return torch.expm1(-difference_BT) + difference_BT
    raise ValueError(f"kl kind must be one of k1, k2, k3, got {kind!r}")
