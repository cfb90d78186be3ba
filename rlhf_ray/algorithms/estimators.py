"""The advantage estimators that a config can name, behind one signature.

An estimator gets the token rewards and the mask, and by name whatever else it declares:

    values_BT    the critic's values; declaring them is what makes a run have a critic
    group_size   rows that answer one prompt; such rows follow each other
    gamma, lam   discount, and GAE's lambda

It returns the advantage of every token, `_BT`, zero on padding. Estimators over whole responses
(`rloo`, `grpo`) take a response's reward to be the sum of its token rewards: its score, less the
KL penalty where that is part of the reward.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf_ray.algorithms import advantages
from rlhf_ray.algorithms.masking import zero_padding
from rlhf_ray.errors import ConfigError
from rlhf_ray.plugins import load_function

GIVEN = ("values_BT", "group_size", "gamma", "lam")
"""What an estimator may ask for besides rewards and mask."""


def gae(
    rewards_BT: Tensor, mask_BT: Tensor, *, values_BT: Tensor, gamma: float, lam: float
) -> Tensor:
    """See `advantages.gae`."""
    return advantages.gae(rewards_BT, values_BT, mask_BT, gamma, lam)[0]


def reinforce(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float) -> Tensor:
    """Rewards to go, see `advantages.reinforce`; whitening takes off their mean, the baseline."""
    return advantages.reinforce(rewards_BT, mask_BT, gamma)


def rloo(rewards_BT: Tensor, mask_BT: Tensor, *, group_size: int) -> Tensor:
    """A response's reward against the mean of the others of its prompt, on each of its tokens."""
    return _spread(advantages.rloo(_response_rewards(rewards_BT), group_size), mask_BT)


def grpo(rewards_BT: Tensor, mask_BT: Tensor, *, group_size: int) -> Tensor:
    """A response's reward, normalised over those of its prompt, on each of its tokens."""
    return _spread(advantages.grpo(_response_rewards(rewards_BT), group_size), mask_BT)


def _response_rewards(rewards_BT: Tensor) -> Tensor:
    return rewards_BT.double().sum(1)  # padding is zero, but for a score that stands there


def _spread(advantages_B: Tensor, mask_BT: Tensor) -> Tensor:
    return zero_padding(advantages_B.unsqueeze(1).expand(mask_BT.shape), mask_BT)


@dataclass(frozen=True)
class Estimator:
    """A function with what is known of it."""

    function: Callable[..., Tensor]
    """`f(rewards_BT, mask_BT, **asked) -> advantages_BT`."""
    asks: tuple[str, ...]
    """Which of `GIVEN` it wants."""
    whitened: bool
    """Whether its advantages are whitened over the batch unless the config says otherwise."""

    @property
    def needs_critic(self) -> bool:
        """Whether it asks for values."""
        return "values_BT" in self.asks

    def __call__(self, rewards_BT: Tensor, mask_BT: Tensor, **given: Any) -> Tensor:
        """The advantages `_BT`; `given` holds every name of `GIVEN`.

        Raises:
            ValueError: the function returned another shape than the mask's.
        """
        asked = {name: given[name] for name in self.asks}
        advantages_BT = self.function(rewards_BT, mask_BT, **asked)
        if advantages_BT.shape != mask_BT.shape:
            raise ValueError(
                f"the advantage function {self.function.__name__} returned "
                f"{tuple(advantages_BT.shape)} for a batch of {tuple(mask_BT.shape)}"
            )
        return zero_padding(advantages_BT, mask_BT)


def describe(function: Callable[..., Tensor], whitened: bool = True) -> Estimator:
    """The estimator that a function is.

    Raises:
        ValueError: it needs an argument that no estimator is given, or lacks the first two.
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


ESTIMATORS = {
    "gae": describe(gae),
    "reinforce": describe(reinforce),
    "rloo": describe(rloo, whitened=False),
    "grpo": describe(grpo, whitened=False),
}
"""By the name in the config. A baseline within the group leaves nothing for whitening to centre,
and rescaling would undo what `grpo` divides by."""


def resolve(name: str) -> Estimator:
    """The estimator that ``ppo.advantage`` names.

    Raises:
        ConfigError: a function of the user's that cannot be had, or asks for too much.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    try:
        return describe(load_function(name, "ppo.advantage"))
    except ValueError as error:
        raise ConfigError(f"ppo.advantage: {error}") from None
