"""Guards over every iteration: detectors, the log-prob mismatch bound, and the response.

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
    RatioGuard,
    RepetitionGuard,
)
from rlhf_ray.driver.checkpoint import Losses
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.errors import DivergenceError, WeightSyncError
from rlhf_ray.observability.progress import Progress
from rlhf_ray.types import REPETITION, ScoredShard

GUARDS = ("repetition", "negative_kl", "ratio", "loss_spike", "prompt_reuse")
WATCHED = ("loss/policy_avg", "policy/grad_norm", "loss/value_avg", "val/grad_norm")
"""Metrics that the loss-spike guard compares with their medians."""
MIN_HISTORY = 5
"""Number of past iterations that a median needs."""

Metrics = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Alarm:
    """A guard that fired."""

    guard: str
    """Its name: one of `GUARDS`, or ``slow_disk``, ``disk_full`` and ``damaged_commit``."""
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
    names = ("response/repeating_share", "response/distinct_bigrams", "objective/kl")
    return Alarm(
        "repetition",
        guard.action,
        _picked(metrics, (*names, "objective/entropy")),
        f"{repeating:.0%} of the responses repeat a token {REPETITION} times or more in a row "
        f"(bound {guard.max_repeating_share:.0%}), and {distinct:.2f} of the bigrams of a response "
        f"are distinct (bound {guard.min_distinct_bigrams:g}), at a KL of {kl:.3g} nats a response "
        f"and an entropy of {entropy:.2g} nats a token. The policy may be gaming its reward: read "
        "ppo/completions.jsonl; if so, raise ppo.kl_coef, lower ppo.kl_target, or fix the reward",
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
    back = "policy and critic go back to the last commit, and the batch is discarded"
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
    """Describe the jump of a metric; return an empty string if there is none."""
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


CALIBRATION_FACTOR = 10.0
FLOOR, CEILING = 1e-4, 0.01
"""Limits of the bound, nats per token, if engine and learner hold equal fp32 weights."""
ROUNDED_FLOOR, ROUNDED_CEILING = 0.02, 0.1
"""Limits of the bound if one of them rounds its weights, or quantises them to int8."""
NF4_CEILING = 0.3
"""Largest bound, and mean error in the proof, of a learner over an nf4 base. Measured on CPU with
the quick start's model: nf4 differs from a bf16 engine by 0.015 nats a token, bf16 from fp32 by
0.003, int8 by 0.002, a temperature of 0.7 by 0.07. It has not been measured on GPUs."""
OUTLIER = 7
"""Bounds by which one token of a shard may exceed the bound, where weights are rounded.

Rounding has heavy tails: the mean of n honest tokens that is far too high is so by one of them, so
the bound widens with 1 / n. Of 200 simulated runs of honest engines 198 broke the bare bound with
shards of a token and 25 with shards of four; none breaks this one."""
JOINED_TOKENS = 32
"""Shards of fewer tokens are checked together as well, where a faulty engine shows all the same."""


class MismatchGuard:
    """Bounds the mean |engine's - learner's log-prob| of every shard.

    The first batch, sampled right after the proof, calibrates the bound: ten times its mean
    mismatch, at least what rounding can cause, at most what a wrong adapter or temperature would.
    """

    def __init__(
        self, engine_is_exact: bool, bound: float | None = None, ceiling: float | None = None
    ) -> None:
        """
        Args:
            engine_is_exact: whether engine and learner compute with the same fp32 weights on CPUs.
            bound: a bound from the config or an earlier process, nats per token; None: calibrate.
            ceiling: largest calibrated bound; None: by ``engine_is_exact``.
        """
        self._is_exact = engine_is_exact
        self._floor = FLOOR if engine_is_exact else ROUNDED_FLOOR
        self._ceiling = ceiling or (CEILING if engine_is_exact else ROUNDED_CEILING)
        self.bound = bound

    def check(self, batch: Sequence[ScoredShard]) -> None:
        """Refuse a batch with a shard over the bound; calibrate the bound on the first batch."""
        if self.bound is None:
            mean, _ = _mean_mismatch(batch)
            self.bound = min(max(CALIBRATION_FACTOR * mean, self._floor), self._ceiling)
        for scored in batch:
            self._refuse_beyond(self.bound, [scored])
        if not self._is_exact:
            for group in _joined(batch):
                self._refuse_beyond(self.bound, group)

    def _refuse_beyond(self, bound: float, shards: Sequence[ScoredShard]) -> None:
        mean, num_tokens = _mean_mismatch(shards)
        limit = bound if self._is_exact else bound * (1 + OUTLIER / num_tokens)
        if not mean <= limit:  # `not <=` also refuses NaN
            info = shards[0].shard.info
            others = f" and {len(shards) - 1} other short ones" if len(shards) > 1 else ""
            raise WeightSyncError(
                f"Shard {info.index} (version {info.versions[0]}){others}: engine and learner "
                f"differ by {mean:.2g} nats a token, the bound is {limit:.2g} for {num_tokens} "
                "tokens. The generator does not sample from the policy: check adapter, base model "
                "and temperature"
            )


def _mean_mismatch(shards: Sequence[ScoredShard]) -> tuple[float, int]:
    """Return the mean over the tokens of some shards, and their number."""
    num_tokens = sum(scored.mismatch.num_tokens for scored in shards)
    total = sum(scored.mismatch.mean * scored.mismatch.num_tokens for scored in shards)
    return total / num_tokens, num_tokens


def _joined(batch: Sequence[ScoredShard]) -> list[list[ScoredShard]]:
    """Join the shards with few tokens to groups with enough of them, as far as there are any."""
    groups: list[list[ScoredShard]] = []
    for scored in batch:
        if scored.mismatch.num_tokens >= JOINED_TOKENS:
            continue
        if not groups or _mean_mismatch(groups[-1])[1] >= JOINED_TOKENS:
            groups.append([])
        groups[-1].append(scored)
    return groups


def refuse_non_finite(metrics: Mapping[str, float], iteration: int) -> None:
    """Refuse to commit an iteration whose losses or gradient norms are not finite."""
    broken = [
        name
        for name, value in metrics.items()
        if name.startswith("loss/") or name.endswith("/grad_norm")
        if not math.isfinite(value)
    ]
    if broken:
        raise DivergenceError(
            f"Iteration {iteration}: {', '.join(broken)} not finite. The last commit is whole; "
            "lower ppo.learning_rate or critic.learning_rate, or raise ppo.kl_coef, and resume"
        )


class Guards:
    """Runs the guards, records and prints their warnings, and decides the response."""

    def __init__(self, guards: GuardsConfig, recorder: Recorder) -> None:
        self._guards = guards
        self._recorder = recorder
        self._last_warned: dict[str, int] = {}

    def check_prompts(self, num_drawn: int, num_prompts: int) -> None:
        """Warn, once per run, if the run passes over its prompts more than once."""
        alarm = prompt_reuse(num_drawn, num_prompts)
        known = any(record["guard"] == "prompt_reuse" for record in self._recorder.warnings())
        if alarm is not None and not known:
            self.warn(0, alarm)

    def require_rollback(
        self, iteration: int, metrics: Mapping[str, float], losses: Losses, num_rollbacks: int
    ) -> bool:
        """Return whether an iteration must be rolled back instead of committed.

        Raises:
            DivergenceError: a guard stops the run.
        """
        spike = self._guards.loss_spike
        # A rollback restores weights that are finite; otherwise NaN would enter the commit.
        if spike.action != "rollback":
            refuse_non_finite(metrics, iteration)
        found = alarms(self._guards, metrics, losses)
        for alarm in found:
            self.warn(iteration, alarm)
            if alarm.action == "stop":
                raise DivergenceError(
                    f"Iteration {iteration}: {alarm.text}. It was not committed; to resume from "
                    "the last commit and only warn about this, set "
                    f"guards.{alarm.guard}.action=warn"
                )
        spikes = [alarm for alarm in found if alarm.action == "rollback"]
        if spikes and num_rollbacks >= spike.max_in_a_row:
            raise DivergenceError(
                f"Iteration {iteration}: {spikes[0].text}. It is the iteration after "
                f"{num_rollbacks} that were rolled back already (guards.loss_spike.max_in_a_row): "
                "other prompts do not help"
            )
        return bool(spikes)

    def warn(self, iteration: int, alarm: Alarm) -> None:
        """Record a warning, and print it unless the same guard's was printed lately."""
        self._recorder.warning(
            {
                "iteration": iteration,
                "guard": alarm.guard,
                "action": alarm.action,
                "numbers": alarm.numbers,
                "text": alarm.text,
            }
        )
        last = self._last_warned.get(alarm.guard)
        if last is None or iteration - last >= self._guards.remind_every:
            self._last_warned[alarm.guard] = iteration
            where = f"ppo, iteration {iteration}" if iteration else "ppo"
            # A new Progress: one made before the bar was shown would print through it.
            Progress().say(f"Warning: {where}, {alarm.guard}: {alarm.text}")
