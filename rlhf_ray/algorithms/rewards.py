"""Token rewards, made from each response's score and its KL penalty."""

from typing import Literal

import torch
from torch import Tensor

from rlhf_ray.algorithms.whitening import require_same_shape, zero_padding
from rlhf_ray.config.overlong import OverlongConfig

ScorePosition = Literal["last_token", "first_pad"]


def token_rewards(
    scores_B: Tensor,
    kl_BT: Tensor,
    mask_BT: Tensor,
    kl_coef: float,
    position: ScorePosition = "last_token",
) -> Tensor:
    """Compute each token's reward: minus the KL penalty, plus the score once per response.

        r_t = -kl_coef * kl_t + [t = score position] * score

    The sign of the penalty is minus: moving away from the reference costs. Source: Ziegler et
    al. 2019 (arXiv:1909.08593) section 2; Ouyang et al. 2022 (arXiv:2203.02155) eq. 2.

    Args:
        scores_B: score of each response, in the reward source's unit.
        kl_BT: KL estimate per token, nats; padding may hold anything.
        mask_BT: 1 on real response tokens.
        kl_coef: weight of the penalty, score units per nat.
        position: token that gets the score, see `score_position`.

    Returns:
        fp32 `_BT`; 0 on padding, except for the score itself with `first_pad`. A row without
        real tokens gets no score.
    """
    require_same_shape(kl_BT=kl_BT, mask_BT=mask_BT)
    if scores_B.shape != mask_BT.shape[:1]:
        raise ValueError(
            f"scores_B {tuple(scores_B.shape)} must hold one score for each row of mask_BT "
            f"{tuple(mask_BT.shape)}"
        )
    at_score_BT = score_position(mask_BT, position)
    scores_BT = scores_B.float().unsqueeze(1).expand(mask_BT.shape)
    return zero_padding(-kl_coef * kl_BT.float(), mask_BT) + zero_padding(scores_BT, at_score_BT)


def length_penalty(overlong: OverlongConfig, max_tokens: int, length: int) -> float:
    """Return what a response's length takes off its score.

        per_token * length + penalty * clamp((length - (max_tokens - buffer)) / buffer, 0, 1)

    The second term is DAPO's soft overlong punishment, Yu et al. 2025 (arXiv:2503.14476) eq. 13.

    Args:
        overlong: the config.
        max_tokens: length limit of responses.
        length: of the response, tokens.
    """
    taken = overlong.per_token * length
    if overlong.buffer is None:
        return taken
    beyond = length - (max_tokens - overlong.buffer)
    return taken + overlong.penalty * min(max(beyond / overlong.buffer, 0.0), 1.0)


def score_position(mask_BT: Tensor, position: ScorePosition) -> Tensor:
    """Mark the position that gets each response's score: bool `_BT`, at most one True per row.

    `last_token` is the last real token, EOS where there is one. `first_pad` is the position after
    it, or the last real token where the row is full; that position then needs a value as well,
    so give `advantages.gae` the mask `mask | score_position(mask, "first_pad")`. Rows without
    real tokens have no position.
    """
    mask_BT = mask_BT.bool()
    num_remaining_BT = mask_BT.flip(1).cumsum(1).flip(1)
    last_BT = mask_BT & (num_remaining_BT == 1)
    if position == "last_token":
        return last_BT
    if position == "first_pad":
        first_pad_BT = torch.zeros_like(last_BT)
        first_pad_BT[:, 1:] = last_BT[:, :-1]
        first_pad_BT[:, -1:] |= last_BT[:, -1:]
        return first_pad_BT
    raise ValueError(f"score position must be last_token or first_pad, got {position!r}")
