"""What watches over PPO, and what is done where it sees trouble."""

from typing import Any, Literal

from pydantic import field_validator

from rlhf_ray.config.section import Section, changeable, fixed


class Guard(Section):
    """One detector; every key may change when a run goes on, so that a stopped run can."""

    @field_validator("action", mode="before", check_fields=False)
    @classmethod
    def _off_is_a_word(cls, action: Any) -> Any:
        return "off" if action is False else action  # YAML reads a bare off as false


class RepetitionGuard(Guard):
    """Sees gibberish and reward hacking: responses that repeat themselves."""

    action: Literal["off", "warn", "stop"] = changeable(
        "warn", description="Where one of the two bounds is passed; stop: before the commit."
    )
    max_repeating_share: float = changeable(
        0.2,
        unit="share",
        gt=0,
        le=1,
        description="Most responses, as a share of the iteration's, that may repeat a token four "
        "times or more in a row (healthy: below .02; a gamed reward: .5 to 1).",
    )
    min_distinct_bigrams: float = changeable(
        0.8,
        unit="share",
        ge=0,
        lt=1,
        description="Least share of distinct bigrams within a response, mean over the iteration's "
        "(healthy short answers: above .99; a gamed reward: .4 to .75).",
    )


class NegativeKlGuard(Guard):
    """Sees samples that were not drawn from the policy: a KL cannot be negative."""

    action: Literal["off", "warn", "stop"] = changeable(
        "warn", description="Where the KL is below the bound; stop: before the commit."
    )
    min_kl: float = changeable(
        -1.0, unit="nats", lt=0, description="Least mean KL to the reference, nats a response."
    )


class RatioGuard(Guard):
    """Sees mini-batches on which the policy has run away from the one that sampled."""

    action: Literal["off", "warn", "skip", "stop"] = changeable(
        "skip",
        description="With a mini-batch over the bound; skip: it moves no weights; stop: nor is "
        "the iteration committed.",
    )
    max_mean: float = changeable(
        10.0,
        unit="–",
        gt=1,
        description="Largest mean ratio pi / pi_old over a mini-batch's tokens; NaN is over it.",
    )


class LossSpikeGuard(Guard):
    """Sees an iteration whose losses or gradient norms jump."""

    action: Literal["off", "warn", "rollback", "stop"] = changeable(
        "warn",
        description="rollback: policy and critic go back to the last commit and the iteration's "
        "rollouts are set aside, also where a loss is not finite; stop: before the commit.",
    )
    factor: float = changeable(
        10.0,
        unit="–",
        gt=1,
        description="Largest multiple of its running median that |loss| or a gradient norm of "
        "policy or critic may be (healthy runs stay below 3).",
    )
    window: int = changeable(
        20,
        unit="iterations",
        ge=5,
        description="Latest iterations that the median is over; the first 5 never fire.",
    )
    max_in_a_row: int = changeable(
        3,
        unit="iterations",
        ge=1,
        description="Rollbacks one after the other; one more is needed: the run stops.",
    )


class GuardsConfig(Section):
    """Each warning is recorded in ppo/warnings.jsonl, shown in the report, and counted."""

    repetition: RepetitionGuard = fixed(RepetitionGuard(), description="Repetition and gibberish.")
    negative_kl: NegativeKlGuard = fixed(NegativeKlGuard(), description="Negative KL.")
    ratio: RatioGuard = fixed(RatioGuard(), description="Runaway importance ratio.")
    loss_spike: LossSpikeGuard = fixed(LossSpikeGuard(), description="Loss spikes.")
    remind_every: int = changeable(
        20,
        unit="iterations",
        ge=1,
        description="Iterations between two lines about one guard on the terminal.",
    )
