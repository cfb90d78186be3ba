"""Where a run stands, besides the state of its learners."""

from dataclasses import dataclass, field

from rlhf_ray.driver.guards.detectors import Losses
from rlhf_ray.driver.scoring import PlainMoments


@dataclass(frozen=True, slots=True)
class RunState:
    """What a commit holds besides the learners."""

    iteration: int = 0
    """Iterations done."""
    version: int = 0
    """Adapter version."""
    prompts_drawn: int = 0
    """Data cursor: prompts learnt from or set aside."""
    samples_generated: int = 0
    """Rollouts that came from generators and belong to a batch."""
    samples_learnt: int = 0
    """Rollouts that were learnt from."""
    samples_set_aside: int = 0
    """Rollouts whose learning was rolled back."""
    samples_requeued: int = 0
    """Rollouts that were handed back by a generator and sampled again."""
    generator_restarts: int = 0
    """Generators that were started anew."""
    kl_coef: float = 0.0
    """Coefficient of the next iteration."""
    gap_bound: float | None = None
    """Bound on the sampler gap, once calibrated."""
    reward_moments: PlainMoments = field(default_factory=dict)
    """Running moments of the reward sources that are scaled by them."""
    losses: Losses = field(default_factory=dict)
    """Latest losses and gradient norms, by which a spike is known."""
    rollbacks_in_a_row: int = 0
    """Iterations up to this one that were rolled back."""
    best_score: float | None = None
    """Best held-out score so far."""
