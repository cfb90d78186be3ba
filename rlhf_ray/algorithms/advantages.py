"""Advantage estimators: how much better a token, or a response, did than expected.

None of them whitens (`whitening` does), and none propagates gradients on purpose: call them on
tensors that carry none.
"""

import torch
from torch import Tensor

from rlhf_ray.algorithms.masking import require_same_shape, zero_padding


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the real tokens of each row.

        delta_t = r_t + gamma * V_{t+1} - V_t          (V past the last real token is 0)
        A_t     = delta_t + gamma * lam * A_{t+1}
        G_t     = A_t + V_t

    t + 1 is the next *real* token: right padding ends the row, and a masked gap inside it (forced
    tokens) is skipped without discount. Source: Schulman et al. 2015 (arXiv:1506.02438) eq. 16.

    Args:
        rewards_BT: reward per token; padding may hold anything.
        values_BT: critic's value before each token, same unit; padding may hold anything.
        mask_BT: 1 on real response tokens.
        gamma: discount per token, in [0, 1].
        lam: trade of bias (0) for variance (1).

    Returns:
        `(advantages_BT, returns_BT)`, fp32, 0 on padding, not whitened.

    Raises:
        ValueError: shapes that differ.
    """
    require_same_shape(rewards_BT=rewards_BT, values_BT=values_BT, mask_BT=mask_BT)
    real_BT = mask_BT.bool()
    rewards_BT = zero_padding(rewards_BT, real_BT)
    values_BT = zero_padding(values_BT, real_BT)
    advantages_BT = torch.zeros_like(rewards_BT)
    next_advantage_B = torch.zeros_like(rewards_BT[:, :1]).squeeze(1)
    next_value_B = torch.zeros_like(next_advantage_B)
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantages_BT[:, t] = advantage_B
        next_advantage_B = torch.where(real_BT[:, t], advantage_B, next_advantage_B)
        next_value_B = torch.where(real_BT[:, t], values_BT[:, t], next_value_B)
    advantages_BT = zero_padding(advantages_BT, real_BT)
    return advantages_BT, advantages_BT + values_BT


def reinforce(rewards_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """Discounted rewards to go, G_t = r_t + gamma * G_{t+1}: fp32 `_BT`, 0 on padding.

    This is `gae` without a critic (V = 0, lam = 1). Source: Williams 1992, REINFORCE.
    """
    advantages_BT, _ = gae(rewards_BT, torch.zeros_like(rewards_BT), mask_BT, gamma, lam=1.0)
    return advantages_BT


def rloo(scores_B: Tensor, group_size: int) -> Tensor:
    """Leave-one-out advantage: a score minus the mean score of the others of its group.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740) section 3.

    Args:
        scores_B: scores; each run of `group_size` rows answers one prompt.
        group_size: samples per prompt, at least 2.

    Returns:
        fp32 `_B`, one advantage per response.

    Raises:
        ValueError: a group of fewer than two, or rows that do not divide into groups.
    """
    scores_GN = _groups(scores_B, group_size)
    others_GN = (scores_GN.sum(1, keepdim=True) - scores_GN) / (group_size - 1)
    return (scores_GN - others_GN).flatten().float()


def grpo(scores_B: Tensor, group_size: int) -> Tensor:
    """Group-normalised advantage: (score - group mean) / (unbiased group std + 1e-8).

    Source: Shao et al. 2024 (arXiv:2402.03300) section 4.1.2. Arguments, result and errors as for
    `rloo`. A group of equal scores gets 0.
    """
    scores_GN = _groups(scores_B, group_size)
    centred_GN = scores_GN - scores_GN.mean(1, keepdim=True)
    std_G1 = scores_GN.std(1, keepdim=True, unbiased=True)
    return (centred_GN / (std_G1 + 1e-8)).flatten().float()


def _groups(scores_B: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise ValueError(
            f"group_size must be at least 2, got {group_size}: "
            "a group advantage needs other samples of the prompt"
        )
    if scores_B.ndim != 1 or len(scores_B) % group_size:
        raise ValueError(
            f"scores of shape {tuple(scores_B.shape)} do not divide into groups of {group_size}"
        )
    # float64: in fp32 the mean of equal scores is off by a rounding error, and its std by one of
    # the same size, so that their quotient would be noise of order one.
    return scores_B.double().view(-1, group_size)
