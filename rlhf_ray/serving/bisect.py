"""The command bisect: the first version of a run for which a condition holds, and what taught it.

A metric that the run logged is looked up, iteration by iteration. One that it did not log is
measured on answers to held-out prompts, of as few versions as a binary search takes.
"""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.driver.checkpoint import kept_versions
from rlhf_ray.driver.kept_batches import FOLDER, SAMPLES
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.observability.samples.index import INDEX
from rlhf_ray.observability.samples.reading import Query, Samples
from rlhf_ray.observability.sinks import read_jsonl
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.serving.measuring import measure_of, measured

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(r"\s*(\S+?)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
SHORT = {
    "repetition": "response/repeating_share",
    "length": "response_length/mean",
    "kl": "objective/kl",
    "score": "objective/scores",
    "entropy": "objective/entropy",
}
"""Short names of metrics."""
OF_ROLLOUTS = ("objective/", "response", "sampler/", "rollout/", "filter/")
"""Beginnings of metrics of an iteration's rollouts; the others are of its learning step."""
REWARDS = ("objective/scores", "objective/kl", "response_length/mean")
"""Metrics that are shown of the iterations around the find, besides each source's score."""
LONGEST_SHOWN = 300
"""Characters of a text that the terminal shows."""

Record = Mapping[str, object]


@dataclass(frozen=True)
class Condition:
    """One metric, a comparison, a number."""

    metric: str
    comparison: str
    bound: float

    def holds(self, value: float) -> bool:
        """Return whether a value meets it."""
        return OPERATORS[self.comparison](value, self.bound)

    def __str__(self) -> str:
        return f"{self.metric} {self.comparison} {self.bound:g}"


@dataclass(frozen=True)
class Value:
    """A metric of a version."""

    version: int
    value: float
    iteration: int | None
    """Iteration that logged it; None: measured now."""


@dataclass(frozen=True)
class Lesson:
    """The iteration whose rollouts taught a version."""

    iteration: int
    rewards: Mapping[str, tuple[float | None, float | None]]
    """Metric -> its value in the iteration before, and in this one."""
    rollouts: Sequence[Record]
    """Prompt, response and score; the best rewarded first."""
    num_kept: int
    """Rollouts of the iteration whose texts were kept."""


@dataclass(frozen=True)
class Find:
    """The outcome of a search."""

    condition: Condition
    first: Value | None
    """The first version for which it holds; None: none."""
    before: Value | None
    """The version before it that was looked at."""
    num_looked_at: int
    extreme: Value
    """The value that comes nearest to the condition, or goes furthest beyond it."""
    lesson: Lesson | None
    """What taught the first version; None where no iteration that was recorded did."""
    nearest: Sequence[int]
    """Kept versions around the find: the newest before it, and the oldest from it on."""


def parse(text: str) -> Condition:
    """Read a condition such as ``repetition > .1``.

    Raises:
        ConfigError: it is not one metric, one comparison and one number.
    """
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"--when {text!r} must be one metric, one of {' '.join(OPERATORS)} and a number, such "
            "as 'repetition > .1'"
        )
    return Condition(SHORT.get(found[1], found[1]), found[2], float(found[3]))


def run(config: Config, when: str, *, num_prompts: int = 16, num_rollouts: int = 4) -> Find:
    """Find the first version of the policy for which a condition holds.

    Args:
        config: the run's.
        when: the condition; its metric is a logged one, or ``module:name`` or ``file.py:name`` of a
            function with TRL's signature, whose mean over answers counts.
        num_prompts: held-out prompts on which a metric that was not logged is measured.
        num_rollouts: rollouts to return of the iteration that taught the version.

    Raises:
        ConfigError: no condition, or no such metric.
        DataError: PPO has not run, or no version is kept that could be measured.
    """
    condition = parse(when)
    folder = RunFolder(config).path
    records = [r for r in read_jsonl(folder / "ppo" / "metrics.jsonl") if "policy/version" in r]
    if not records:
        raise DataError(f"{folder} has no iteration of PPO yet; run the stage ppo first")
    values = _logged(condition.metric, records, read_jsonl(folder / "ppo" / "eval.jsonl"))
    if not values:
        measure = measure_of(condition.metric)
        if measure is None:
            raise ConfigError(_unknown(condition.metric, records))
        found = measured(config, measure, condition.holds, num_prompts)
        values = [Value(version, value, None) for version, value in found.items()]
    index = next((n for n, each in enumerate(values) if condition.holds(each.value)), None)
    sign = 1 if condition.comparison.startswith(">") else -1
    first = None if index is None else values[index]
    return Find(
        condition=condition,
        first=first,
        before=values[index - 1] if index else None,
        num_looked_at=len(values),
        extreme=max(values, key=lambda each: sign * each.value),
        lesson=_lesson(folder, records, first.version, num_rollouts) if first else None,
        nearest=_around(kept_versions(folder / "checkpoints"), first.version) if first else (),
    )


def _logged(name: str, records: Sequence[Record], evals: Sequence[Record]) -> list[Value]:
    """Return the logged values in order, each with the version that it is of."""
    if name.startswith("eval/"):
        found = [(each, _number(each, "version")) for each in evals]
    else:
        found = [(each, _version_of(name, each)) for each in records]
    return [
        Value(int(version), value, int(_number(each, "iteration") or 0))
        for each, version in found
        if version is not None and (value := _number(each, name)) is not None
    ]


def _version_of(name: str, record: Record) -> float | None:
    """Return the version that sampled an iteration's rollouts, or that its step made."""
    version = _number(record, "policy/version")
    if version is None or not name.startswith(OF_ROLLOUTS):
        return version
    return version - 1 - (_number(record, "rollout/staleness") or 0)


def _number(record: Record, name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else None


def _unknown(name: str, records: Sequence[Record]) -> str:
    logged = {key for record in records for key in record if "/" in key} | SHORT.keys()
    near = get_close_matches(name, sorted(logged), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "docs/metrics.md lists them."
    return (
        f"{name!r} is no metric that this run logged; {hint} A function of yours, as file.py:name, "
        "is measured on held-out prompts"
    )


def _around(kept: Sequence[int], version: int) -> list[int]:
    before = [each for each in kept if each < version]
    since = [each for each in kept if each >= version]
    return [*before[-1:], *since[:1]]


def _lesson(folder: Path, records: Sequence[Record], version: int, num: int) -> Lesson | None:
    """Return the iteration that made a version, with its rewards and its best rollouts."""
    index = next((n for n, r in enumerate(records) if r["policy/version"] == version), None)
    if index is None:
        return None
    record, earlier = records[index], records[index - 1] if index else {}
    names = [*REWARDS, *(key for key in record if key.startswith("objective/scores/"))]
    iteration = int(_number(record, "iteration") or 0)
    kept = read_jsonl(folder / "ppo" / FOLDER / str(iteration) / SAMPLES)
    best = sorted(kept, key=lambda each: -(_number(each, "score") or 0.0))[:num]
    num_kept = len(kept)
    if not kept:
        best, num_kept = _recorded(folder / "ppo", iteration, num)
    shown = ("prompt", "response", "score")
    return Lesson(
        iteration=iteration,
        rewards={name: (_number(earlier, name), _number(record, name)) for name in names},
        rollouts=[{key: each.get(key) for key in shown} for each in best],
        num_kept=num_kept,
    )


def _recorded(stage: Path, iteration: int, num: int) -> tuple[Sequence[Record], int]:
    """Return the best rewarded of an iteration's recorded samples, and how many those are."""
    if not (stage / INDEX).exists():  # none are recorded (run.record.samples=0)
        return [], 0
    samples = Samples(stage)
    of_iteration = Query(ranges={"iteration": (iteration, iteration)}, sort="score")
    found = samples.find(of_iteration, size=num)
    records = [samples.record(row) for row in found.rows]
    return [record for record in records if record is not None], found.total


def as_mapping(find: Find) -> dict[str, object]:
    """Return a find as plain values."""
    return {**asdict(find), "condition": str(find.condition)}


def as_text(find: Find, run: str) -> str:
    """Return a find as text for the terminal.

    Args:
        find: the outcome.
        run: how the command names the run.
    """
    first, lesson = find.first, find.lesson
    if first is None:
        return (
            f"{find.condition} holds for none of {find.num_looked_at} values; the nearest is "
            f"{_said(find.extreme)}"
        )
    lines = [f"{find.condition} holds first for {_said(first)}"]
    if find.before is not None:
        lines.append(f"Before it: {_said(find.before)}")
    earliest = find.before.version + 1 if find.before else 0
    if first.iteration is None and earliest < first.version:
        lines.append(
            f"Only kept versions can be measured: it may hold from version {earliest} on. The "
            "iteration below made the first that was measured"
        )
    if lesson is None:
        lines.append(
            "No iteration taught it: the run started from this version"
            if not first.version
            else "What taught it is not recorded: its iteration was rolled back"
        )
    else:
        lines += _lines(lesson)
    if find.nearest:
        if first.version not in find.nearest:
            lines.append(f"Version {first.version} is not kept; the nearest are compared here")
        around = ",".join(map(str, find.nearest))
        lines.append(f"Compare: rlhf-ray generate {run}@{around}")
    return "\n".join(lines)


def _lines(lesson: Lesson) -> list[str]:
    lines = [
        f"Iteration {lesson.iteration} taught it, from the version before:",
        f"{'':32} {'before':>10} {'then':>10}",
        *(f"{name:32} {_cell(a)} {_cell(b)}" for name, (a, b) in lesson.rewards.items()),
    ]
    if lesson.num_kept:
        lines.append(f"The best rewarded of {lesson.num_kept} rollouts whose text was kept:")
    for each in lesson.rollouts:
        lines.append(f"  score {_cell(_number(each, 'score')).strip()}")
        lines += [f"    {key}: {_line(str(each.get(key)))}" for key in ("prompt", "response")]
    return lines


def _said(value: Value) -> str:
    where = "measured now" if value.iteration is None else f"iteration {value.iteration}"
    return f"version {value.version}: {value.value:.4g} ({where})"


def _cell(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:10.4g}"


def _line(text: str) -> str:
    short = " ".join(text.split())
    return short if len(short) <= LONGEST_SHOWN else f"{short[:LONGEST_SHOWN]}..."
