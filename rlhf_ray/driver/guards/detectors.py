"""What the guards see in the numbers of an iteration: pure decisions, a function a guard."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rlhf_ray.algorithms.repetition import RUN
from rlhf_ray.config.guards import (
    GuardsConfig,
    LossSpikeGuard,
    NegativeKlGuard,
    RatioGuard,
    RepetitionGuard,
)

GUARDS = ("repetition", "negative_kl", "ratio", "loss_spike", "prompt_reuse")
WATCHED = ("loss/policy_avg", "policy/grad_norm", "loss/value_avg", "val/grad_norm")
"""Metrics that may spike."""
MIN_HISTORY = 5
"""Iterations that a median needs."""

Metrics = Mapping[str, float]
Losses = Mapping[str, Sequence[float]]
"""Watched metric -> its absolute values in the latest iterations, as a commit keeps them."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """A guard that fired."""

    guard: str
    """Which, of `GUARDS`."""
    action: str
    """What its config asks for: warn, skip, rollback or stop."""
    numbers: Mapping[str, float]
    """What it fired on, by metric name."""
    text: str
    """What was seen, what it may mean, what to change: whole sentences, no full stop at the end."""


def alarms(guards: GuardsConfig, metrics: Metrics, losses: Losses) -> list[Alarm]:
    """The guards that an iteration sets off; of those that are off, none."""
    found = (
        _repetition(guards.repetition, metrics),
        _negative_kl(guards.negative_kl, metrics),
        _ratio(guards.ratio, metrics),
        _loss_spike(guards.loss_spike, metrics, losses),
    )
    return [alarm for alarm in found if alarm is not None and alarm.action != "off"]


def prompt_reuse(num_drawn: int, num_prompts: int) -> Alarm | None:
    """Whether a whole run passes over its prompts more than once."""
    if num_drawn <= num_prompts:
        return None
    passes = num_drawn / num_prompts
    return Alarm(
        "prompt_reuse",
        "warn",
        {"drawn": num_drawn, "prompts": num_prompts},
        f"The whole run draws {num_drawn} prompts and has {num_prompts}: {passes:.1f} passes. On "
        "prompts that it has seen before, a policy fits the reward's faults sooner than it gets "
        "better; give more prompts, or lower ppo.iterations",
    )


def remembered(losses: Losses, metrics: Metrics, window: int) -> dict[str, list[float]]:
    """The latest values of what may spike, with those of one more iteration."""
    return {
        name: [*losses.get(name, ()), *([abs(metrics[name])] if name in metrics else ())][-window:]
        for name in WATCHED
    }


def _repetition(guard: RepetitionGuard, metrics: Metrics) -> Alarm | None:
    repeating, distinct = metrics["response/repeating_share"], metrics["response/distinct_bigrams"]
    if repeating <= guard.max_repeating_share and distinct >= guard.min_distinct_bigrams:
        return None
    kl, entropy = metrics["objective/kl"], metrics["objective/entropy"]
    names = ("response/repeating_share", "response/distinct_bigrams", "objective/kl")
    return Alarm(
        "repetition",
        guard.action,
        _picked(metrics, (*names, "objective/entropy")),
        f"{repeating:.0%} of the responses repeat a token {RUN} times or more in a row (bound "
        f"{guard.max_repeating_share:.0%}), and {distinct:.2f} of the bigrams of a response are "
        f"distinct (bound {guard.min_distinct_bigrams:g}), at a KL of {kl:.3g} nats a response and "
        f"an entropy of {entropy:.2g} nats a token. The policy may be gaming its reward: read "
        "ppo/completions.jsonl; if so, raise ppo.kl_coef, lower ppo.kl_target, or mend the reward",
    )


def _negative_kl(guard: NegativeKlGuard, metrics: Metrics) -> Alarm | None:
    kl = metrics["objective/kl"]
    if kl >= guard.min_kl:
        return None
    return Alarm(
        "negative_kl",
        guard.action,
        {"objective/kl": kl},
        f"The mean KL to the reference is {kl:.3g} nats a response, below {guard.min_kl:g}. Over "
        "samples of the policy it is never far below 0, so the responses are not such samples: "
        "padding counts as actions, the end-of-sequence token is suppressed or forced, or the "
        "sampler changes probabilities that the log-probs do not know of. Look for it in the "
        "rollout section, rollout.engine_args included; until then the KL penalty is a reward",
    )


def _ratio(guard: RatioGuard, metrics: Metrics) -> Alarm | None:
    num_exceeded = metrics.get("policy/ratio_exceeded", 0)
    if not num_exceeded:
        return None
    done = "moved the weights all the same" if guard.action == "warn" else "moved no weights"
    return Alarm(
        "ratio",
        guard.action,
        _picked(metrics, ("policy/ratio_exceeded", "val/ratio_minibatch_max")),
        f"Mini-batches whose mean ratio to the policy that sampled exceeds {guard.max_mean:g}: "
        f"{num_exceeded:.0f}, the largest mean {metrics['val/ratio_minibatch_max']:.3g}; they "
        f"{done}. Lower ppo.learning_rate or ppo.epochs, or raise ppo.mini_batch_size",
    )


def _loss_spike(guard: LossSpikeGuard, metrics: Metrics, losses: Losses) -> Alarm | None:
    jumps = {name: text for name in WATCHED if (text := _jump(name, guard, metrics, losses))}
    if not jumps:
        return None
    back = "policy and critic go back to the last commit, and the batch is set aside"
    offer = "guards.loss_spike.action=rollback keeps such iterations out of the policy"
    return Alarm(
        "loss_spike",
        guard.action,
        _picked(metrics, tuple(jumps)),
        f"{', '.join(jumps.values())} (bound {guard.factor:g} times); "
        f"{back if guard.action == 'rollback' else offer}. Look at objective/scores: against a "
        "reward that jumps, set clip or scale: running of its source; else lower "
        "ppo.learning_rate or critic.learning_rate",
    )


def _jump(name: str, guard: LossSpikeGuard, metrics: Metrics, losses: Losses) -> str:
    """What is wrong with a metric; empty where nothing is."""
    value, known = abs(metrics.get(name, 0.0)), losses.get(name, ())
    if not math.isfinite(value):
        return f"{name} is not finite"
    usual = median(known) if len(known) >= MIN_HISTORY else 0.0
    if not usual or value <= guard.factor * usual:
        return ""
    return (
        f"{name} of {value:.3g} is {value / usual:.3g} times its median over the last "
        f"{len(known)} iterations"
    )


def _picked(metrics: Metrics, names: Sequence[str]) -> dict[str, float]:
    return {name: metrics[name] for name in names}
