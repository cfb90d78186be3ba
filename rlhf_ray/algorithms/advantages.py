"""Advantage estimators: how much better a token, or a response, was than expected.

None of them whitens (`whitening` does), and none is meant to propagate gradients: call them on
tensors without.

A config names an estimator, which `resolve` returns. It takes the token rewards and the mask, and
by name any of these that it declares as parameters:

    values_BT    the critic's values; a run has a critic only if its estimator declares them
    group_size   number of rows per prompt; rows of one prompt are next to each other
    sizes_B      sum of the magnitudes that a response's reward was added up from
    gamma, lam   discount, and GAE's lambda

It returns the advantage of every token, `_BT`, zero on padding. Estimators over whole responses
(`rloo`, `grpo`, `dr_grpo`) take a response's reward to be the sum of its token rewards: its score,
less the KL penalty where that is part of the reward.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.algorithms.whitening import ROUNDING, require_same_shape, zero_padding
from rlhf_ray.config.algorithms import ESTIMATORS
from rlhf_ray.errors import ConfigError
from rlhf_ray.plugins import load_function


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimation over the real tokens of each row.

        delta_t = r_t + gamma * V_{t+1} - V_t          (V past the last real token is 0)
        A_t     = delta_t + gamma * lam * A_{t+1}
        G_t     = A_t + V_t

    t + 1 is the next *real* token: right padding ends the row, and masked tokens inside it (forced
    ones) are skipped without discount. Source: Schulman et al. 2015 (arXiv:1506.02438) eq. 16.

    Args:
        rewards_BT: reward per token; padding may hold anything.
        values_BT: critic's value before each token, same unit; padding may hold anything.
        mask_BT: 1 on real response tokens.
        gamma: discount per token, in [0, 1].
        lam: trade of bias (0) for variance (1).

    Returns:
        `(advantages_BT, returns_BT)`, fp32, 0 on padding, not whitened.
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


def grpo(scores_B: Tensor, group_size: int, sizes_B: Tensor | None = None) -> Tensor:
    """Group-normalised advantage: (score - group mean) / (unbiased group std + 1e-8).

    Source: Shao et al. 2024 (arXiv:2402.03300) section 4.1.2. Arguments, result and errors as for
    `rloo`. A group whose scores differ by rounding alone gets 0: divided by its own deviation,
    rounding would become advantages of order one. Rounding is up to 1e-6 of a score's size, and
    that at least 1: a model adds up its score, however small, from products of that size.

    Args:
        scores_B: scores.
        group_size: samples per prompt.
        sizes_B: what a score's rounding is relative to, by default the score: the sum of the
            magnitudes that it was added up from, which may cancel.
    """
    scores_GN = _groups(scores_B, group_size)
    sizes_GN = scores_GN.abs() if sizes_B is None else _groups(sizes_B, group_size)
    centred_GN = scores_GN - scores_GN.mean(1, keepdim=True)
    std_G1 = scores_GN.std(1, keepdim=True, unbiased=True)
    is_equal_G1 = _are_equal(scores_GN, sizes_GN)
    return torch.where(is_equal_G1, 0.0, centred_GN / (std_G1 + 1e-8)).flatten().float()


def equal_groups(scores_B: Tensor, group_size: int) -> list[bool]:
    """Return for each group whether its scores differ by no more than rounding, see `grpo`."""
    scores_GN = _groups(scores_B, group_size)
    return [bool(is_equal) for is_equal in _are_equal(scores_GN, scores_GN.abs())]


def dr_grpo(scores_B: Tensor, group_size: int) -> Tensor:
    """Group-centred advantage: score - group mean, without the deviation that `grpo` divides by.

    Divided by it, prompts that are nearly always or nearly never answered well weigh more. Source:
    Liu et al. 2025 (arXiv:2503.20783) section 3.2. Arguments, result and errors as for `rloo`,
    whose advantages are group_size / (group_size - 1) times these.
    """
    scores_GN = _groups(scores_B, group_size)
    return (scores_GN - scores_GN.mean(1, keepdim=True)).flatten().float()


def _are_equal(scores_GN: Tensor, sizes_GN: Tensor) -> Tensor:
    range_G1 = scores_GN.amax(1, keepdim=True) - scores_GN.amin(1, keepdim=True)
    return range_G1 <= ROUNDING * sizes_GN.amax(1, keepdim=True).clamp(min=1.0)


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


GIVEN = ("values_BT", "group_size", "sizes_B", "gamma", "lam")
"""Parameters that an estimator may declare besides rewards and mask."""


def estimate_gae(
    rewards_BT: Tensor, mask_BT: Tensor, *, values_BT: Tensor, gamma: float, lam: float
) -> Tensor:
    """Return `gae`'s advantages, as an estimator."""
    return gae(rewards_BT, values_BT, mask_BT, gamma, lam)[0]


def estimate_rloo(rewards_BT: Tensor, mask_BT: Tensor, *, group_size: int) -> Tensor:
    """Return `rloo` of each response's total reward, on each of its tokens."""
    return _spread(rloo(_response_rewards(rewards_BT), group_size), mask_BT)


def estimate_grpo(
    rewards_BT: Tensor, mask_BT: Tensor, *, group_size: int, sizes_B: Tensor | None = None
) -> Tensor:
    """Return `grpo` of each response's total reward, on each of its tokens."""
    return _spread(grpo(_response_rewards(rewards_BT), group_size, sizes_B), mask_BT)


def estimate_dr_grpo(rewards_BT: Tensor, mask_BT: Tensor, *, group_size: int) -> Tensor:
    """Return `dr_grpo` of each response's total reward, on each of its tokens."""
    return _spread(dr_grpo(_response_rewards(rewards_BT), group_size), mask_BT)


def _response_rewards(rewards_BT: Tensor) -> Tensor:
    return rewards_BT.double().sum(1)  # padding is zero, but for a score that stands there


def _spread(advantages_B: Tensor, mask_BT: Tensor) -> Tensor:
    return zero_padding(advantages_B.unsqueeze(1).expand(mask_BT.shape), mask_BT)


@dataclass(frozen=True)
class Estimator:
    """An advantage function, with the parameters that it declares."""

    function: Callable[..., Tensor]
    """`f(rewards_BT, mask_BT, **arguments) -> advantages_BT`."""
    asks: tuple[str, ...]
    """The names of `GIVEN` that it declares."""
    whitened: bool
    """Whether its advantages are whitened over the batch unless the config says otherwise."""

    @property
    def needs_critic(self) -> bool:
        """Whether it needs the critic's values."""
        return "values_BT" in self.asks

    @property
    def needs_groups(self) -> bool:
        """Whether it compares responses to the same prompt."""
        return "group_size" in self.asks

    def __call__(self, rewards_BT: Tensor, mask_BT: Tensor, **given: Tensor | float) -> Tensor:
        """Return the advantages `_BT`, zero on padding.

        `given` must hold every name of `GIVEN` that the function declares without a default.

        Raises:
            ValueError: the function returned another shape than the mask's.
        """
        arguments = {name: given[name] for name in self.asks if name in given}
        advantages_BT = self.function(rewards_BT, mask_BT, **arguments)
        if advantages_BT.shape != mask_BT.shape:
            raise ValueError(
                f"the advantage function {self.function.__name__} returned "
                f"{tuple(advantages_BT.shape)} for a batch of {tuple(mask_BT.shape)}"
            )
        return zero_padding(advantages_BT, mask_BT)


def describe(function: Callable[..., Tensor], whitened: bool = True) -> Estimator:
    """Make an estimator from a function, by its signature.

    Raises:
        ValueError: it requires a parameter that is not in `GIVEN`, or lacks the first two.
    """
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(named) < 2:
        raise ValueError(
            f"the advantage function {function.__name__} takes {len(named)} arguments by name; the "
            "first two are rewards_BT and mask_BT"
        )
    further = named[2:]
    unknown = [p.name for p in further if p.name not in GIVEN and p.default is p.empty]
    if unknown:
        raise ValueError(
            f"the advantage function {function.__name__} asks for {', '.join(unknown)}; after "
            f"rewards_BT and mask_BT it may ask for {', '.join(GIVEN)}"
        )
    return Estimator(function, tuple(p.name for p in further if p.name in GIVEN), whitened)


def resolve(name: str) -> Estimator:
    """Return the estimator that ``ppo.advantage`` names.

    Raises:
        ConfigError: the user's function cannot be imported, or its signature does not fit.
    """
    entry = ESTIMATORS.get(name)
    try:
        if entry is not None:
            return describe(load_function(entry.function, "ppo.advantage"), entry.whitened)
        return describe(load_function(name, "ppo.advantage"))
    except ValueError as error:
        raise ConfigError(f"ppo.advantage: {error}") from None
