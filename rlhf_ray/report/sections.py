"""The sections of the report below its key numbers; each is empty if the run lacks its data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from rlhf_ray.config.section import masked
from rlhf_ray.observability.metrics import METRICS
from rlhf_ray.report.data import Record, RunFiles, number
from rlhf_ray.report.plots import Curve, curves
from rlhf_ray.report.texts import short


@dataclass(frozen=True)
class Chart:
    """A chart with its caption."""

    title: str
    svg: Markup
    caption: str


@dataclass(frozen=True)
class Supervised:
    """Results of a supervised stage."""

    title: str
    chart: Chart | None
    rows: Sequence[tuple[str, float | None, float | None]]
    """Figure, before, after."""
    facts: Sequence[tuple[str, float]]
    groups: Sequence[Record]
    """Parameters by module: name, parameters, trainable."""


@dataclass(frozen=True)
class _Plan:
    """A chart's metrics: training metrics with their labels, and a metric of the evaluations."""

    title: str
    metrics: Mapping[str, str]
    evaluation: str | None = None


_PPO_CHARTS = (
    _Plan("Reward", {"objective/scores": "training rollouts"}, "eval/score"),
    _Plan("Gold score", {}, "eval/gold"),
    _Plan("KL to the reference", {"objective/kl": "training rollouts"}, "eval/kl"),
    _Plan("Entropy", {"policy/entropy_avg": "policy"}),
    _Plan("Response length", {"response_length/mean": "training rollouts"}, "eval/length"),
    _Plan("Policy loss", {"loss/policy_avg": "policy"}),
    _Plan("Value loss", {"loss/value_avg": "critic"}),
    _Plan("Clip fraction", {"policy/clipfrac_avg": "policy", "val/clipfrac_avg": "critic"}),
    _Plan("Explained variance of the critic", {"val/explained_variance": "critic"}),
    _Plan("Responses that repeat themselves", {"response/repeating_share": "training rollouts"}),
    _Plan("Distinct bigrams", {"response/distinct_bigrams": "training rollouts"}),
    _Plan("KL coefficient", {"objective/kl_coef": "coefficient"}),
    _Plan("Prompts whose responses all score the same", {"filter/equal_share": "of those drawn"}),
    _Plan("Log-prob mismatch between engine and learner", {"sampler/gap_mean": "mismatch"}),
)

_SUPERVISED = (
    ("pretrain", "Pretraining", ("perplexity",), ("steps", "tokens", "parameters")),
    ("sft", "Supervised fine-tuning", ("loss", "perplexity"), ("steps", "trainable_parameters")),
    (
        "reward",
        "Reward model",
        ("accuracy", "auc", "correlation"),
        ("pairs_train", "pairs_eval", "rows_train", "rows_eval"),
    ),
    ("dpo", "Direct preference optimisation", ("loss",), ("pairs_train", "pairs_eval")),
)

_FACTS = {
    "pairs_train": "training pairs",
    "pairs_eval": "held-out pairs",
    "rows_train": "training rows",
    "rows_eval": "held-out rows",
}
"""Labels of a summary's keys; other keys are shown as they are."""


def ppo_charts(files: RunFiles) -> list[Chart]:
    """Draw PPO's curves over iterations, without charts whose metrics were not logged."""
    records = files.metrics.get("ppo", ())
    charts = []
    for plan in _PPO_CHARTS:
        lines = [_curve(label, records, name) for name, label in plan.metrics.items()]
        names = list(plan.metrics)
        if plan.evaluation:
            lines.append(
                _curve("held-out prompts", files.evaluations, plan.evaluation, points=True)
            )
            names = names or [plan.evaluation]
        lines = [line for line in lines if line.x]
        if lines:
            svg = Markup(curves(plan.title, lines, "iteration", _marks(files, "ppo")))
            charts.append(Chart(f"{plan.title}{_unit(names[0])}", svg, _caption(names)))
    return charts


def compared_charts(runs: Mapping[str, RunFiles]) -> list[Chart]:
    """Draw each of PPO's metrics over iterations, a line a run, where any run has logged it."""
    charts = []
    for plan in _PPO_CHARTS:
        metrics = dict(plan.metrics)
        if plan.evaluation:
            metrics[plan.evaluation] = "held-out prompts"
        for name, label in metrics.items():
            lines = [_curve(run, _records(files, name), name) for run, files in runs.items()]
            lines = [line for line in lines if line.x]
            if lines:
                title = f"{plan.title}, {label}" if len(metrics) > 1 else plan.title
                svg = Markup(curves(f"{title} of runs", lines, "iteration"))
                charts.append(Chart(f"{title}{_unit(name)}", svg, _caption([name])))
    return charts


def _records(files: RunFiles, metric: str) -> Sequence[Record]:
    """Return PPO's records that a metric is in."""
    return files.evaluations if metric.startswith("eval/") else files.metrics.get("ppo", ())


def changes(files: RunFiles) -> list[Record]:
    """Return a row per key that was changed on resume, with the last unit of work before it."""
    rows = []
    for record in files.changes:
        units = {s: "iteration" if s == "ppo" else "step" for s in record.get("after", {})}
        after = ", ".join(f"{unit} {record['after'][s]} of {s}" for s, unit in units.items())
        for key, change in record["changes"].items():
            name = key.rpartition(".")[2]
            values = {which: short(masked(change[which], name)) for which in ("before", "now")}
            rows.append(
                {"time": record.get("time", "–"), "after": after or "–", "key": key} | values
            )
    return rows


def warnings(files: RunFiles) -> list[Record]:
    """Return a row per guard that fired: its iterations, its action and its latest message."""
    by_guard: dict[str, list[Record]] = {}
    for record in files.warnings:
        by_guard.setdefault(str(record.get("guard", "–")).replace("_", " "), []).append(record)
    return [
        {
            "guard": guard,
            "count": len(records),
            "first": records[0].get("iteration", "–"),
            "last": records[-1].get("iteration", "–"),
            "action": records[-1].get("action", "–"),
            "text": short(records[-1].get("text", "")),
        }
        for guard, records in by_guard.items()
    ]


def supervised(files: RunFiles) -> list[Supervised]:
    """Return loss curve, figures before and after, and sizes of each supervised stage."""
    stages = []
    for stage, title, figures, facts in _SUPERVISED:
        summary = files.summaries.get(stage, {})
        line = _curve("training loss", files.metrics.get(stage, ()), "loss", key="step")
        chart = (
            Chart("Training loss", _loss_curve(files, stage, title, line), "") if line.x else None
        )
        rows = [row for name in figures if any((row := _before_after(summary, name))[1:])]
        known = [(name, value) for name in facts if (value := number(summary, name)) is not None]
        if chart or rows or known:
            named = [(_FACTS.get(name, name.replace("_", " ")), value) for name, value in known]
            groups = summary.get("parameter_groups", ())
            stages.append(Supervised(title, chart, rows, named, groups))
    return stages


def _loss_curve(files: RunFiles, stage: str, title: str, line: Curve) -> Markup:
    return Markup(curves(f"{title}: loss", [line], "optimizer step", _marks(files, stage)))


def _marks(files: RunFiles, stage: str) -> list[float]:
    """Return where values of a stage were changed on resume: after this iteration or step."""
    known = (number(record, "after", stage) for record in files.changes)
    return [last for last in known if last is not None]


def figure(value: float | None, decimals: int | None = None) -> str:
    """Format a number with three significant digits or the given decimals; a dash if unknown."""
    if value is None:
        return "–"
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def _curve(
    label: str, records: Sequence[Record], name: str, key: str = "iteration", points: bool = False
) -> Curve:
    """Return a metric's values over ``key``; null and non-finite values become gaps."""
    pairs = [
        (x, number(record, name))
        for record in records
        if name in record and (x := number(record, key)) is not None
    ]
    if all(y is None for _, y in pairs):
        return Curve(label, (), (), points)
    return Curve(
        label, [x for x, _ in pairs], [math.nan if y is None else y for _, y in pairs], points
    )


def _caption(names: Sequence[str]) -> str:
    return " ".join(METRICS[name].meaning for name in names)


def _unit(name: str) -> str:
    unit = METRICS[name].unit
    return "" if unit == "1" else f" ({unit})"


def _before_after(summary: Record, name: str) -> tuple[str, float | None, float | None]:
    after = number(summary, f"{name}_after")
    return (
        f"held-out {name}",
        number(summary, f"{name}_before"),
        number(summary, name) if after is None else after,
    )
