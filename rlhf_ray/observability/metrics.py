"""Registered metrics: look-up by name, merging over ranks, and ``docs/metrics.md``."""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rlhf_ray.observability.registry import ROWS, How


@dataclass(frozen=True)
class Reduction:
    """The reduction of several values to the logged one."""

    how: How
    over: str = ""
    """What the values belong to, such as samples."""

    def __str__(self) -> str:
        words = "" if self.how == "statistic" else self.how
        return f"{words} over {self.over}".strip() if self.over else self.how

    def merge(self, values: Sequence[float], num_tokens: Sequence[int]) -> float:
        """Merge the values that the ranks of a learner group report.

        Raises:
            ValueError: a statistic that differs between the ranks: they saw parts of the batch.
        """
        if self.how == "mean":
            weighted = zip(values, num_tokens, strict=True)
            return sum(value * weight for value, weight in weighted) / sum(num_tokens)
        if self.how == "maximum":
            return max(values)
        if self.how == "sum":
            return sum(values)
        if self.how == "count":
            return values[0]
        first = values[0]
        if all(math.isclose(value, first, rel_tol=1e-6, abs_tol=1e-9) for value in values) or all(
            map(math.isnan, values)
        ):
            return first
        raise ValueError(
            f"ranks reported different values, {', '.join(map(str, values))}, of a metric whose "
            f"reduction is '{self}', which cannot be merged; compute it from the whole batch, or "
            "register it as a mean, maximum, sum or count"
        )


@dataclass(frozen=True)
class Metric:
    """One logged number."""

    name: str
    """Key in metrics.jsonl, tag in TensorBoard."""
    unit: str
    """Unit of the value; `1` for a pure number."""
    reduction: Reduction
    """How the logged value is formed, and how the ranks of a learner group merge theirs."""
    meaning: str
    """What the number says, in a sentence."""

    @property
    def label(self) -> str | None:
        """Label of a family's members: ``source`` in ``objective/scores/<source>``."""
        return self.name.partition("<")[2].rstrip(">") or None


METRICS: dict[str, Metric] = {
    name: Metric(name, unit, Reduction(*reduction), meaning)
    for name, unit, reduction, meaning in ROWS
}

_FAMILIES = {name.partition("<")[0]: name for name in METRICS if "<" in name}
"""Metrics with one member per source, model or actor, by the beginning of the members' names."""


def registered_as(name: str) -> str | None:
    """Return the registry's name of a metric; that of its family for a member of one."""
    if name in METRICS:
        return name
    return next((family for start, family in _FAMILIES.items() if name.startswith(start)), None)


def is_registered(name: str) -> bool:
    """Return whether a metric is in the registry, itself or as a member of a family."""
    return registered_as(name) is not None


def metric(name: str) -> Metric:
    """Return the registry's entry of a logged name.

    Raises:
        KeyError: the name is not registered.
    """
    check([name])
    return METRICS[registered_as(name) or name]


def check(names: Iterable[str]) -> None:
    """Refuse names that are not registered, so that nothing is logged undocumented.

    Raises:
        KeyError: naming each unknown metric and the registered name nearest to it.
    """
    unknown = [name for name in names if not is_registered(name)]
    if not unknown:
        return
    described = []
    for name in unknown:
        near = difflib.get_close_matches(name, METRICS, n=1)
        described.append(f"{name} (nearest: {near[0]})" if near else name)
    raise KeyError(
        f"not registered: {', '.join(described)}. "
        "Add the metric to rlhf_ray.observability.registry and regenerate docs/metrics.md."
    )


def markdown_table() -> str:
    """Return the text of ``docs/metrics.md``."""
    lines = [
        "# Metrics",
        "",
        "Every number in `metrics.jsonl`, `eval.jsonl` and Ray's metrics, generated from",
        "`rlhf_ray/observability/registry.py`. Unit `1` is a pure number; nats are natural-log",
        "units of information. Names in Prometheus: [watching.md](watching.md).",
        "",
        "| name | unit | reduction | meaning |",
        "|---|---|---|---|",
    ]
    for metric in METRICS.values():
        meaning = metric.meaning.replace("|", "\\|")
        lines.append(f"| `{metric.name}` | {metric.unit} | {metric.reduction} | {meaning} |")
    return "\n".join(lines) + "\n"
