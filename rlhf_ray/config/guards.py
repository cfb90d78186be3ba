"""Guards of PPO: a detector and the response to it, each."""

from typing import Literal

from pydantic import field_validator

from rlhf_ray.config.section import Section, changeable, fixed


class Guard(Section):
    """One detector. Every key may change on resume, so that a run it stopped can continue."""

    @field_validator("action", mode="before", check_fields=False)
    @classmethod
    def _off_is_a_word(cls, action: object) -> object:
        return "off" if action is False else action  # YAML 1.1 reads a bare off as false


class RepetitionGuard(Guard):
    """Detects gibberish and reward hacking: responses that repeat themselves."""

    action: Literal["off", "warn", "stop"] = changeable(
        "warn", description="Response if either bound is passed; stop: before the commit."
    )
    max_repeating_share: float = changeable(
        0.2,
        unit="share",
        gt=0,
        le=1,
        description="Most responses of an iteration that may repeat a token four times or more in "
        "a row (healthy: below .02; a gamed reward: .5 to 1).",
    )
    min_distinct_bigrams: float = changeable(
        0.8,
        unit="share",
        ge=0,
        lt=1,
        description="Least distinct bigrams within a response, mean over the iteration (healthy "
        "short answers: above .99; a gamed reward: .4 to .75).",
    )


class NegativeKlGuard(Guard):
    """Detects samples that were not drawn from the policy: a true KL cannot be negative."""

    action: Literal["off", "warn", "stop"] = changeable(
        "warn", description="Response if the KL is below the bound; stop: before the commit."
    )
    min_kl: float = changeable(
        -1.0, unit="nats", lt=0, description="Least mean KL to the reference, per response."
    )


class RatioGuard(Guard):
    """Detects mini-batches on which the policy has moved far from the one that sampled."""

    action: Literal["off", "warn", "skip", "stop"] = changeable(
        "skip",
        description="Response to a mini-batch over the bound; skip: it changes no weights; stop: "
        "the run also stops before the commit.",
    )
    max_mean: float = changeable(
        10.0,
        unit="–",
        gt=1,
        description="Largest mean ratio pi / pi_old over a mini-batch's tokens; NaN exceeds it.",
    )


class NonFiniteGuard(Guard):
    """Detects losses, gradients or a KL that are not finite: they never enter a commit."""

    action: Literal["rollback", "stop"] = changeable(
        "rollback",
        description="rollback: policy and critic return to the last commit and the iteration's "
        "rollouts are discarded, guards.loss_spike.max_in_a_row times at most; stop: before the "
        "commit.",
    )


class LossSpikeGuard(Guard):
    """Detects an iteration whose losses or gradient norms jump."""

    action: Literal["off", "warn", "rollback", "stop"] = changeable(
        "warn",
        description="rollback: policy and critic return to the last commit and the iteration's "
        "rollouts are discarded; stop: before the commit.",
    )
    factor: float = changeable(
        10.0,
        unit="–",
        gt=1,
        description="Largest |loss| or gradient norm of policy or critic, as a multiple of its "
        "running median (healthy runs stay below 3).",
    )
    window: int = changeable(
        20,
        unit="iterations",
        ge=5,
        description="Latest iterations in the median; the first 5 never fire.",
    )
    max_in_a_row: int = changeable(
        3,
        unit="iterations",
        ge=1,
        description="Most consecutive rollbacks, those of guards.non_finite included; if one more "
        "is needed, the run stops.",
    )


class StallGuard(Section):
    """Detects a run that no longer commits; it keeps a stack of every process in stacks/."""

    factor: float = changeable(
        10.0,
        unit="–",
        ge=0,
        description="Longest time without a commit, as a multiple of the median iteration; 0: off.",
    )
    min_s: float = changeable(
        120.0, unit="seconds", ge=0, description="Least such time, however short the iterations."
    )
    first_s: float = changeable(
        1800.0, unit="seconds", gt=0, description="Such time before the first iteration is done."
    )


class GuardsConfig(Section):
    """Detectors of trouble in PPO. Each warning goes to ppo/warnings.jsonl and the report."""

    repetition: RepetitionGuard = fixed(RepetitionGuard(), description="Repetition and gibberish.")
    negative_kl: NegativeKlGuard = fixed(NegativeKlGuard(), description="Negative KL.")
    ratio: RatioGuard = fixed(RatioGuard(), description="Runaway importance ratio.")
    non_finite: NonFiniteGuard = fixed(
        NonFiniteGuard(), description="Losses and gradients that are not finite."
    )
    loss_spike: LossSpikeGuard = fixed(LossSpikeGuard(), description="Loss spikes.")
    stall: StallGuard = fixed(StallGuard(), description="Runs that hang.")
    remind_every: int = changeable(
        20,
        unit="iterations",
        ge=1,
        description="Iterations between two lines of one guard on the terminal.",
    )
