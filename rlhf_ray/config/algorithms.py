"""The advantage estimators and policy losses that a config can name, and what each needs; no torch.

Their functions stand in `rlhf_ray.algorithms`; `module:name` in a config names one of yours.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EstimatorEntry:
    """One estimator."""

    function: str
    """``module:name``; see `algorithms.advantages` for its signature."""
    does: str
    """How it works, for docs/config.md."""
    needs_critic: bool = False
    needs_groups: bool = False
    """True if it compares responses to the same prompt, so that a prompt needs several."""
    whitened: bool = True
    """Whether advantages are whitened over the batch unless ppo.whiten_advantages is set."""


# A baseline within the group leaves nothing for whitening to centre, and rescaling would undo what
# grpo divides by, and dr_grpo doesn't.
ESTIMATORS: Mapping[str, EstimatorEntry] = {
    "gae": EstimatorEntry(
        "rlhf_ray.algorithms.advantages:estimate_gae", "(with a critic)", needs_critic=True
    ),
    "reinforce": EstimatorEntry(
        "rlhf_ray.algorithms.advantages:reinforce", "(reward less the batch's mean)"
    ),
    "rloo": EstimatorEntry(
        "rlhf_ray.algorithms.advantages:estimate_rloo",
        "(reward less the mean of the prompt's other responses)",
        needs_groups=True,
        whitened=False,
    ),
    "grpo": EstimatorEntry(
        "rlhf_ray.algorithms.advantages:estimate_grpo",
        "(reward normalised over the prompt's responses)",
        needs_groups=True,
        whitened=False,
    ),
    "dr_grpo": EstimatorEntry(
        "rlhf_ray.algorithms.advantages:estimate_dr_grpo",
        "(reward less the mean of the prompt's responses)",
        needs_groups=True,
        whitened=False,
    ),
}
"""Value of ppo.advantage -> its estimator."""

POLICY_LOSSES: Mapping[str, str] = {
    "clip": "rlhf_ray.algorithms.policy_losses:policy_loss",
    "gspo": "rlhf_ray.algorithms.policy_losses:gspo_loss",
    "cispo": "rlhf_ray.algorithms.policy_losses:cispo_loss",
}
"""Value of ppo.policy_loss -> its function, as ``module:name``."""
