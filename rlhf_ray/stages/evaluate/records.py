"""Records of an evaluation besides its summary: metrics for trackers, tables for the terminal."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from rlhf_ray.config import Config
from rlhf_ray.observability.sinks import JsonlSink, Sink, Sinks, TensorBoardSink, read_jsonl
from rlhf_ray.observability.trackers import current
from rlhf_ray.secrecy import printable
from rlhf_ray.stages.evaluate.comparison import Interval, Ranking, Summary
from rlhf_ray.stages.evaluate.models import SFT

NUMBERS = {
    "reward_mean": "reward",
    "gold_mean": "gold",
    "rouge_mean": "ROUGE-L",
    "perplexity": "perplexity",
    "instruction_pass_rate": "followed",
}
"""Plain number that a model may have in the summary, also a metric -> its heading in a table."""


def metrics_of(summary: Summary) -> dict[str, float]:
    """Return every number of every model, by registered metric name."""
    ratings = summary["judges"][summary["judge"]]["elo"]
    metrics = {}
    for name, model in summary["models"].items():
        label = re.sub(r"[^\w.-]+", "_", name).strip("_")  # as every tracker accepts it
        metrics |= {f"{key}/{label}": model[key] for key in NUMBERS if key in model}
        metrics[f"elo/{label}"] = ratings[name]["value"]
        if "win_rate" in model:
            metrics[f"win_rate/{label}"] = model["win_rate"]["value"]
    return metrics


def withdraw_summary(folder: Path) -> None:
    """Remove the summary of an earlier evaluation; the trackers get its step once more."""
    summary = folder / "summary.json"
    if summary.is_file():
        current().forget("evaluate")
        summary.unlink()


def log_metrics(config: Config, folder: Path, version: int, metrics: Mapping[str, float]) -> None:
    """Log to the trackers and to ``metrics.jsonl``, which has a line for each policy evaluated."""
    path = folder / "metrics.jsonl"
    lines = JsonlSink(path, "step")
    lines.truncate_after("step", version - 1)
    trackers = current().sinks("evaluate", "step", read_jsonl(path))
    local: list[Sink] = []
    if config.trackers.tensorboard:
        local.append(TensorBoardSink(folder / "tensorboard", purge_step=version))
    sinks = Sinks([lines, *local, *trackers])
    sinks.log(version, metrics)
    sinks.close()


def tables(summary: Summary) -> Iterator[Table]:
    """Yield tables with a row for each model: all numbers and the first judge, then the others.

    They fit 100 columns, except for models' names, which fold.
    """
    first, *others = summary["judges"]
    models = summary["models"]
    numbers = [name for name in NUMBERS if any(name in model for model in models.values())]
    table = _table(f"{summary['num_prompts']} held-out prompts, judged by {first}", numbers)
    for name, model in models.items():
        plain = (f"{model[number]:.3g}" if number in model else "–" for number in numbers)
        table.add_row(*_rank(summary["judges"][first], name), *plain)
    yield table
    for judge in others:
        table = _table(f"judged by {judge}", ())
        for name in models:
            table.add_row(*_rank(summary["judges"][judge], name))
        yield table


def _table(title: str, numbers: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    table.add_column("model", overflow="fold")
    for heading in ("win rate over sft", "Elo", *(NUMBERS[number] for number in numbers)):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _rank(ranking: Ranking, name: str) -> tuple[str, str, str]:
    """Return a model's name, win rate over sft and rating, with their intervals."""
    rate, rating = ranking["win_rates"][name].get(SFT), ranking["elo"][name]
    return escape(printable(name)), _with_interval(rate, ".2f"), _with_interval(rating, ".0f")


def _with_interval(estimate: Interval | None, form: str) -> str:
    if estimate is None:
        return "–"
    value, (low, high) = estimate["value"], estimate["ci95"]
    return f"{value:{form}}" + (f" ({low:{form}}–{high:{form}})" if low < high else "")
