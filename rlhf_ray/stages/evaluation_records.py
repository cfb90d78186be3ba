"""What an evaluation leaves besides its summary: metrics for trackers, a table for the terminal."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from rlhf_ray.config import Config
from rlhf_ray.observability.sinks import JsonlSink, Sink, Sinks, TensorBoardSink, read_jsonl
from rlhf_ray.observability.trackers import current

Summary = Mapping[str, Any]

NUMBERS = ("reward_mean", "gold_mean", "rouge_mean", "perplexity", "instruction_pass_rate")
"""Plain numbers that a model may have in the summary; metrics of the same names."""


def metrics_of(summary: Summary) -> dict[str, float]:
    """Every number of every model, by registered name."""
    ratings = summary["judges"][summary["judge"]]["elo"]
    metrics = {}
    for name, model in summary["models"].items():
        label = re.sub(r"[^\w.-]+", "_", name).strip("_")  # what every tracker takes
        metrics |= {f"{key}/{label}": model[key] for key in NUMBERS if key in model}
        metrics[f"elo/{label}"] = ratings[name]["value"]
        if "win_rate" in model:
            metrics[f"win_rate/{label}"] = model["win_rate"]["value"]
    return metrics


def tell(config: Config, folder: Path, version: int, metrics: Mapping[str, float]) -> None:
    """Write ``metrics.jsonl``, a line for each newest policy that was evaluated, and tell trackers.

    Args:
        config: the run's.
        folder: the stage's.
        version: of the newest policy.
        metrics: by registered name.
    """
    path = folder / "metrics.jsonl"
    if (folder / "summary.json").is_file():
        current().forget("evaluate")
    lines = JsonlSink(path, "step")
    lines.truncate_after("step", version - 1)
    told = current().sinks("evaluate", "step", read_jsonl(path))
    local: list[Sink] = []
    if config.trackers.tensorboard:
        local.append(TensorBoardSink(folder / "tensorboard", purge_step=version))
    sinks = Sinks([lines, *local, *told])
    sinks.log(version, metrics)
    sinks.close()


def table(summary: Summary) -> Table:
    """A row a model for the terminal."""
    judge, *others = summary["judges"]
    numbers = [
        name for name in NUMBERS if any(name in model for model in summary["models"].values())
    ]
    view = Table(title=f"{summary['num_prompts']} held-out prompts, judged by {judge}")
    view.add_column("model", overflow="fold")
    headings = ["win rate over sft", "Elo", *(f"win rate by {other}" for other in others)]
    for heading in (*headings, *(name.replace("_", " ") for name in numbers)):
        view.add_column(heading, justify="right")
    for name, model in summary["models"].items():
        view.add_row(
            escape(name),
            _with_interval(model.get("win_rate"), ".2f"),
            _with_interval(summary["judges"][judge]["elo"][name], ".0f"),
            *(_over_sft(summary["judges"][other], name) for other in others),
            *(f"{model[number]:.3g}" if number in model else "–" for number in numbers),
        )
    return view


def _over_sft(judged: Mapping[str, Any], name: str) -> str:
    rate = judged["win_rates"][name].get("sft")
    return "–" if rate is None else f"{rate['value']:.2f}"


def _with_interval(estimate: Mapping[str, Any] | None, form: str) -> str:
    """A value above its interval, so that several fit side by side."""
    if estimate is None:
        return "–"
    low, high = estimate["ci95"]
    if low == high:
        return f"{estimate['value']:{form}}"
    return f"{estimate['value']:{form}} ({low:{form}} to {high:{form}})"
