"""Panels of the dashboard: one per registered metric, and some of Ray's own metrics."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rlhf_ray.observability.metrics import METRICS, Metric
from rlhf_ray.observability.series import exported

ROWS = ("Training", "Generation", "Roles", "Reliability", "Cluster", "Supervised stages")

RUN = 'run=~"$run"'
"""Selects the runs that the dashboard's variable names."""

_ROW_OF = {
    "rollout/": "Generation",
    "response": "Generation",
    "sampler/": "Generation",
    "filter/": "Generation",
    "generators/": "Generation",
    "timing_s/": "Roles",
    "throughput/": "Roles",
    "actors/": "Roles",
    "cost/": "Cluster",
    "commit/": "Reliability",
    "config/": "Reliability",
    "effective_time_ratio": "Reliability",
    "ledger/": "Reliability",
    "lost_s/": "Reliability",
    "restarts/": "Reliability",
    "disk/": "Cluster",
    "loss": "Supervised stages",
    "eval_": "Supervised stages",
    "learning_rate": "Supervised stages",
    "grad_norm": "Supervised stages",
    "epoch": "Supervised stages",
    "loss/": "Training",
    "episode": "Training",
}
"""Row of a metric by the longest of these that its name begins with; else the first row."""

_CORRECTED = "with ppo.importance_cap or ppo.importance_mask"
_FILTERED = "with ppo.filter_groups.max_refills"
_SCHEDULED = "with ppo.scheduler or ppo.warmup_iterations"
_NOT_ALWAYS: Mapping[str, str] = {
    "cost/per_1000_samples": "where cluster.gpu_hour_price is set",
    "loss/kl_avg": "where ppo.kl_in is loss",
    "policy/learning_rate": _SCHEDULED,
    "val/learning_rate": _SCHEDULED,
    "policy/epochs": "with ppo.stop_kl",
    "sampler/weight_mean": _CORRECTED,
    "sampler/masked_share": _CORRECTED,
    "sampler/ess_share": _CORRECTED,
    "filter/prompts": _FILTERED,
    "filter/replaced": _FILTERED,
    "filter/equal_share": _FILTERED,
    "filter/refills": _FILTERED,
    "filter/scores": _FILTERED,
    "eval/gold": "where the data has a gold score",
    "timing_s/eval": "after an evaluation",
    "timing_s/keep": "with run.keep_batches",
    "timing_s/save": "where a commit was written meanwhile",
    "config/changes": "where a key was changed on resume",
    "data/skipped": "where prompts were discarded",
    "lost_s/<cause>": "where time was lost",
    "restarts/<role>": "where something was restarted",
}
"""When a metric that a PPO run may lack has values. A run without supervised stages also lacks the
metrics of that row."""

_UNITS = {"s": "s", "bytes": "bytes", "share": "percentunit", "1/s": "ops", "tokens/s": "ops"}
"""Grafana's names of our units."""


@dataclass(frozen=True)
class Panel:
    """One graph."""

    title: str
    expr: str
    """PromQL; ``$run`` is the dashboard's variable."""
    legend: str
    unit: str
    """Grafana's name of the unit."""
    description: str


def panels() -> dict[str, list[Panel]]:
    """Return the panels by row in the order of the registry, without empty rows."""
    rows: dict[str, list[Panel]] = {row: [] for row in ROWS}
    for metric in METRICS.values():
        # Comparisons of finished models belong in the report; they do not change over time.
        if metric.label != "model":
            rows[_row(metric.name)].append(_of_metric(metric))
    rows["Cluster"] += _of_ray()
    return {row: panels for row, panels in rows.items() if panels}


def _row(name: str) -> str:
    fitting = [start for start in _ROW_OF if name.startswith(start)]
    return _ROW_OF[max(fitting, key=len)] if fitting else ROWS[0]


def _of_metric(metric: Metric) -> Panel:
    selected = f"{exported(metric.name)}{{{RUN}}}"
    description = f"{metric.meaning} Reduction: {metric.reduction}. Unit: {metric.unit}."
    legend, when = "{{run}}", _NOT_ALWAYS.get(metric.name)
    if metric.label == "actor":
        legend = "{{role}}-{{rank}}"
    elif metric.label:
        legend = f"{{{{run}}}} {{{{{metric.label}}}}}"
    elif _row(metric.name) == "Supervised stages":
        legend, when = "{{run}} {{role}}", "while such a stage runs"
    if metric.name == "commit/time":
        return Panel("seconds since the last commit", f"time() - {selected}", legend, "s", "")
    if when:
        # A point without a value: Grafana shows an empty graph instead of an error.
        selected += " or on() vector(NaN)"
        description += f" Has values only {when}."
    unit = _UNITS.get(metric.unit, "none")
    return Panel(metric.name, selected, legend, unit, description)


def _of_ray() -> Iterator[Panel]:
    """Yield panels of Ray's own metrics of the nodes, for all runs together."""
    node, gpu = "{{NodeAddress}}", "{{NodeAddress}} {{GpuIndex}}"
    yield Panel(
        "CPUs busy",
        "avg by (NodeAddress) (ray_node_cpu_utilization) / 100",
        node,
        "percentunit",
        "Share of a node's cores.",
    )
    yield Panel(
        "memory used",
        "sum by (NodeAddress) (ray_node_mem_used) / sum by (NodeAddress) (ray_node_mem_total)",
        node,
        "percentunit",
        "Share of a node's memory.",
    )
    yield Panel(
        "GPUs busy",
        "avg by (NodeAddress, GpuIndex) (ray_node_gpus_utilization) / 100 or on() vector(NaN)",
        gpu,
        "percentunit",
        "Where there are any.",
    )
    yield Panel(
        "GPU memory used",
        "sum by (NodeAddress, GpuIndex) (ray_node_gram_used) * 1048576 or on() vector(NaN)",
        gpu,
        "bytes",
        "Where there are any.",
    )
    yield Panel(
        "free disk of nodes",
        "sum by (NodeAddress) (ray_node_disk_free)",
        node,
        "bytes",
        "Of Ray's temporary folder.",
    )
