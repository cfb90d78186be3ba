"""Controllers of the KL coefficient over a run: fixed, or adapted to reach a target KL."""

import math

from rlhf_ray.config.ppo import PpoConfig
from rlhf_ray.errors import DivergenceError


class FixedKL:
    """Keeps the KL coefficient at its initial value; `state_dict` is for a resumed run."""

    coef: float
    """Current weight of the KL penalty, score units per nat."""

    def __init__(self, coef: float) -> None:
        if not (math.isfinite(coef) and coef >= 0):
            raise ValueError(f"the KL coefficient must be finite and >= 0, got {coef}")
        self.coef = coef

    def update(self, kl: float, num_samples: int) -> None:
        """Update the coefficient after an iteration; here it is fixed.

        Args:
            kl: k1 of the iteration, nats: mean over samples of the token *sum*, or mean over
                tokens with ``ppo.kl_target_per_token``.
            num_samples: rollouts in the iteration, over all ranks.
        """

    def state_dict(self) -> dict[str, float]:
        """Return the state that a resumed run needs to continue as if it had not stopped."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of an earlier `state_dict`."""
        self.coef = float(state["coef"])


class AdaptiveKL(FixedKL):
    """Proportional controller on the logarithm of the coefficient.

        coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * num_samples / horizon

    Source: Ziegler et al. 2019 (arXiv:1909.08593) section 2.2.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        """
        Args:
            init: first coefficient; 0 would stay 0.
            target: target KL, nats, per sample or per token as `update`'s ``kl``.
            horizon: number of samples over which the coefficient adapts.
        """
        super().__init__(init)
        if not (target > 0 and horizon > 0):
            raise ValueError(f"KL target and horizon must be > 0, got {target} and {horizon}")
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_samples: int) -> None:
        """Raise the coefficient if the KL is above the target, lower it if below.

        Raises:
            DivergenceError: the KL is not finite; the coefficient would stay so for good.
        """
        if not math.isfinite(kl):
            raise DivergenceError(
                f"KL of {num_samples} samples is {kl}, so the KL coefficient ({self.coef:g}) "
                "cannot be updated. Resume from the last commit with a lower ppo.learning_rate"
            )
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_samples / self.horizon


def kl_controller(ppo: PpoConfig, adapted: float | None = None) -> FixedKL:
    """Return the controller of a run: adaptive where the config sets a target.

    Args:
        ppo: the config.
        adapted: coefficient that a resumed run had reached from the config's; None: it begins, or
            its config has another one by now, which counts.
    """
    target = ppo.kl_target or ppo.kl_target_per_token
    if target is None or ppo.kl_coef == 0:
        return FixedKL(ppo.kl_coef)
    controller = AdaptiveKL(ppo.kl_coef, target, ppo.kl_horizon)
    if adapted is not None:
        controller.load_state_dict({"coef": adapted})
    return controller
