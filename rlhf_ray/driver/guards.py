"""Guards over every iteration: detectors, and the response.

A detector is a pure function of an iteration's metrics. `Guards` runs them before the iteration is
committed, and warns, stops the run, or requires a rollback.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rlhf_ray.config.guards import (
    GuardsConfig,
    LossSpikeGuard,
    NegativeKlGuard,
    NonFiniteGuard,
    RatioGuard,
    RepetitionGuard,
)
from rlhf_ray.driver.checkpoint import Losses, SavedCommit
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.errors import DivergenceError
from rlhf_ray.observability.progress import Progress
from rlhf_ray.types import REPETITION

GUARDS = (
    "mismatch",
    "repetition",
    "negative_kl",
    "ratio",
    "non_finite",
    "loss_spike",
    "prompt_reuse",
)
WATCHED = ("loss/policy_avg", "policy/grad_norm", "loss/value_avg", "val/grad_norm")
"""Metrics that the loss-spike guard compares with their medians."""
MIN_HISTORY = 5
"""Number of past iterations that a median needs."""
GOES_BACK = "policy and critic go back to the last commit, and the batch is discarded"

Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Alarm:
    """A guard that fired."""

    guard: str
    """Its name: of `GUARDS`, or ``slow_disk``, ``disk_full``, ``data_lost``, ``damaged_commit``,
    ``filter_groups``."""
    action: str
    """The response, such as warn, skip, rollback or stop for those that a config sets."""
    numbers: Mapping[str, float]
    """The metrics that it fired on, by name."""
    text: str
    """Finding, possible cause and suggestion: whole sentences, no full stop at the end."""


def alarms(guards: GuardsConfig, metrics: Metrics, losses: Losses) -> list[Alarm]:
    """Return the alarms of an iteration, without those of guards that are off."""
    found = (
        _repetition(guards.repetition, metrics),
        _negative_kl(guards.negative_kl, metrics),
        _ratio(guards.ratio, metrics),
        _non_finite(guards.non_finite, metrics),
        _loss_spike(guards.loss_spike, metrics, losses),
    )
    return [alarm for alarm in found if alarm is not None and alarm.action != "off"]


def prompt_reuse(num_drawn: int, num_prompts: int) -> Alarm | None:
    """Return an alarm if the whole run passes over its prompts more than once."""
    if num_drawn <= num_prompts:
        return None
    passes = num_drawn / num_prompts
    return Alarm(
        "prompt_reuse",
        "warn",
        {"drawn": num_drawn, "prompts": num_prompts},
        f"The run will draw {num_drawn} prompts from a set of {num_prompts}: {passes:.1f} epochs. "
        "On repeated prompts a policy is more likely to exploit errors of the reward than to "
        "improve; lower ppo.iterations, or begin a new run with more prompts",
    )


def damaged_commits(saved: SavedCommit) -> Alarm:
    """Return the alarm of a run that resumes from a commit before a damaged one."""
    return Alarm(
        "damaged_commit",
        "resume before it",
        {"version": saved.version},
        f"Of the commits on disk these are damaged: {', '.join(saved.damaged)}. The run resumes "
        f"from version {saved.version} and does the iterations after it again; check the disk",
    )


def remembered(losses: Losses, metrics: Metrics, window: int) -> dict[str, list[float]]:
    """Append an iteration to the watched metrics' latest values; keep the last ``window``."""
    return {
        name: [*losses.get(name, ()), *([abs(metrics[name])] if name in metrics else ())][-window:]
        for name in WATCHED
    }


def _repetition(guard: RepetitionGuard, metrics: Metrics) -> Alarm | None:
    repeating, distinct = metrics["response/repeating_share"], metrics["response/distinct_bigrams"]
    if repeating <= guard.max_repeating_share and distinct >= guard.min_distinct_bigrams:
        return None
    kl, entropy = metrics["objective/kl"], metrics["objective/entropy"]
    ended = metrics["response_length/eos_share"]
    names = ("response/repeating_share", "response/distinct_bigrams", "objective/kl")
    return Alarm(
        "repetition",
        guard.action,
        _picked(metrics, (*names, "objective/entropy", "response_length/eos_share")),
        f"{repeating:.0%} of the responses repeat a token {REPETITION} times or more in a row "
        f"(bound {guard.max_repeating_share:.0%}), and {distinct:.2f} of the bigrams of a response "
        f"are distinct (bound {guard.min_distinct_bigrams:g}), at a KL of {kl:.3g} nats a response "
        f"and an entropy of {entropy:.2g} nats a token. The policy may be gaming its reward: read "
        "ppo/completions.jsonl; if so, raise ppo.kl_coef, lower ppo.kl_target, set "
        f"ppo.missing_eos_penalty if few responses end ({ended:.0%} do), or fix the reward",
    )


def _negative_kl(guard: NegativeKlGuard, metrics: Metrics) -> Alarm | None:
    kl = metrics["objective/kl"]
    if not kl < guard.min_kl:  # NaN is `_non_finite`'s
        return None
    if age := metrics.get("rollout/staleness"):
        return Alarm(
            "negative_kl",
            guard.action,
            {"objective/kl": kl, "rollout/staleness": age},
            f"The mean KL to the reference is {kl:.3g} nats a response, below {guard.min_kl:g}. "
            f"The samples are up to {age:.0f} versions old, and the policy has moved so far from "
            "them that they say little of its KL; lower ppo.max_staleness or ppo.learning_rate",
        )
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


def non_finite(metrics: Metrics) -> list[str]:
    """Return the names of the losses, gradient norms and KL that are not finite.

    Other metrics may be undefined: constant returns have no variance to explain.
    """
    return [
        name
        for name, value in metrics.items()
        if name.startswith("loss/") or name.endswith("/grad_norm") or name == "objective/kl"
        if not math.isfinite(value)
    ]


def _non_finite(guard: NonFiniteGuard, metrics: Metrics) -> Alarm | None:
    broken = non_finite(metrics)
    if not broken:
        return None
    return Alarm(
        "non_finite",
        guard.action,
        _picked(metrics, broken),
        f"{', '.join(f'{name} is not finite' for name in broken)}; {GOES_BACK}. If it comes back, "
        "lower ppo.learning_rate or critic.learning_rate, or raise ppo.kl_coef",
    )


def _loss_spike(guard: LossSpikeGuard, metrics: Metrics, losses: Losses) -> Alarm | None:
    jumps = {name: text for name in WATCHED if (text := _jump(name, guard, metrics, losses))}
    if not jumps:
        return None
    offer = "guards.loss_spike.action=rollback keeps such iterations out of the policy"
    return Alarm(
        "loss_spike",
        guard.action,
        _picked(metrics, tuple(jumps)),
        f"{', '.join(jumps.values())} (bound {guard.factor:g} times); "
        f"{GOES_BACK if guard.action == 'rollback' else offer}. Look at objective/scores: against "
        "a reward that jumps, set clip or scale: running of its source; else lower "
        "ppo.learning_rate or critic.learning_rate",
    )


def _jump(name: str, guard: LossSpikeGuard, metrics: Metrics, losses: Losses) -> str:
    """Describe the jump of a metric; return an empty string if there is none."""
    value, known = abs(metrics.get(name, 0.0)), losses.get(name, ())
    if not math.isfinite(value):
        return ""  # `_non_finite` has it
    usual = median(known) if len(known) >= MIN_HISTORY else 0.0
    if not usual or value <= guard.factor * usual:
        return ""
    return (
        f"{name} of {value:.3g} is {value / usual:.3g} times its median over the last "
        f"{len(known)} iterations"
    )


def _picked(metrics: Metrics, names: Sequence[str]) -> dict[str, float]:
    return {name: metrics[name] for name in names}


class Guards:
    """Runs the guards, records and prints their warnings, and decides the response."""

    def __init__(
        self, guards: GuardsConfig, recorder: Recorder, batches: str | None = None
    ) -> None:
        """
        Args:
            guards: the detectors' settings.
            recorder: of the run.
            batches: folder within the stage's where batches with warnings are kept; None: nowhere.
        """
        self._guards = guards
        self._batches = batches
        self._warned_at = 0
        self._recorder = recorder
        self._last_warned: dict[str, int] = {}

    def check_prompts(self, num_drawn: int, num_prompts: int) -> None:
        """Warn, once per run, if the run passes over its prompts more than once."""
        alarm = prompt_reuse(num_drawn, num_prompts)
        known = any(record["guard"] == "prompt_reuse" for record in self._recorder.warnings())
        if alarm is not None and not known:
            self.warn(0, alarm)

    def check(
        self, iteration: int, metrics: Mapping[str, float], losses: Losses
    ) -> Sequence[Alarm]:
        """Warn of whatever the detectors find in an iteration; return it."""
        found = alarms(self._guards, metrics, losses)
        for alarm in found:
            self.warn(iteration, alarm)
        return found

    def has_warned(self, iteration: int) -> bool:
        """Return whether a guard has warned of an iteration."""
        return self._warned_at == iteration

    def require_rollback(self, iteration: int, found: Sequence[Alarm], num_rollbacks: int) -> bool:
        """Return whether an iteration must be rolled back instead of committed.

        Raises:
            DivergenceError: a guard stops the run.
        """
        for alarm in found:
            if alarm.action == "stop":
                other = "rollback" if alarm.guard == "non_finite" else "warn"
                raise DivergenceError(
                    f"Iteration {iteration}: {alarm.text}. It was not committed; to resume from "
                    f"the last commit and not stop at this, set guards.{alarm.guard}.action={other}"
                )
        undone = [alarm for alarm in found if alarm.action == "rollback"]
        if undone and num_rollbacks >= self._guards.loss_spike.max_in_a_row:
            raise DivergenceError(
                f"Iteration {iteration}: {undone[0].text}. It is the iteration after "
                f"{num_rollbacks} that were rolled back already (guards.loss_spike.max_in_a_row): "
                "other prompts do not help"
            )
        return bool(undone)

    def warn(self, iteration: int, alarm: Alarm) -> None:
        """Record a warning, and print it unless the same guard's was printed lately."""
        batch: dict[str, str] = {}
        if iteration and alarm.guard in GUARDS:
            self._warned_at = iteration
            batch = {"batch": f"{self._batches}/{iteration}"} if self._batches else {}
        self._recorder.warning(
            {
                "iteration": iteration,
                "guard": alarm.guard,
                "action": alarm.action,
                "numbers": alarm.numbers,
                "text": alarm.text,
                **batch,
            }
        )
        last = self._last_warned.get(alarm.guard)
        if last is None or iteration - last >= self._guards.remind_every:
            self._last_warned[alarm.guard] = iteration
            where = f"ppo, iteration {iteration}" if iteration else "ppo"
            # A new Progress: one made before the bar was shown would print through it.
            Progress().say(f"Warning: {where}, {alarm.guard}: {alarm.text}")
