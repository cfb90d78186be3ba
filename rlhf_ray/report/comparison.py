"""A page that lays runs beside each other: outcomes, curves, config, win rates between them."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from pathlib import Path

from rlhf_ray.config.section import is_mapping
from rlhf_ray.errors import ConfigError
from rlhf_ray.report import evaluation, sections
from rlhf_ray.report.data import Record, RunFiles, number, read_run
from rlhf_ray.report.plots import MAX_CURVES
from rlhf_ray.report.report import template, write_page
from rlhf_ray.report.sections import figure
from rlhf_ray.report.story import verdict

_OWN = ("run.name", "run.dir", "run.scratch")
"""Keys in which two runs always differ."""
_Z = 1.959964
"""Quantile of the normal distribution for an interval of 95%."""


@dataclass(frozen=True)
class WinRate:
    """How often one run's answer to a held-out prompt scores higher than another's."""

    first: str
    second: str
    score: str
    """What was compared: ``gold`` or ``reward``."""
    num_prompts: int
    """Prompts that both have answered."""
    value: float
    """Ties count half."""
    interval: tuple[float, float]


def build(run_dirs: Sequence[Path], page: Path) -> Path:
    """Write a page that compares runs, finished or not; returns its path.

    Raises:
        ConfigError: there are fewer than two runs, one comes twice, or there are too many.
        DataError: a folder holds nothing of a run.
    """
    folders = [folder.resolve() for folder in run_dirs]
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise ConfigError("Give the folders of at least two runs, each once")
    if len(folders) > MAX_CURVES:
        raise ConfigError(f"{len(folders)} runs cannot be told apart: give at most {MAX_CURVES}")
    runs = dict(zip(_labels(folders), map(read_run, folders), strict=True))
    html = template("comparison").render(
        runs=list(runs),
        written=datetime.now(),
        verdicts={name: verdict(files) for name, files in runs.items()},
        outcomes=_outcomes(runs),
        win_rates=list(win_rates(runs)),
        charts=sections.compared_charts(runs),
        differences=differences(runs),
    )
    write_page(page, html)
    return page


def _labels(folders: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with as many parents as tell them apart."""
    num_parts = 1
    while len({folder.parts[-num_parts:] for folder in folders}) < len(folders):
        num_parts += 1
    return ["/".join(folder.parts[-num_parts:]) for folder in folders]


def differences(runs: Mapping[str, RunFiles]) -> list[tuple[str, list[str]]]:
    """Return the config keys in which runs differ, with the value of each run."""
    flat = [dict(_flat(files.config)) for files in runs.values()]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = [(key, [config.get(key, "–") for config in flat]) for key in keys if key not in _OWN]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flat(values: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if is_mapping(value) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "none" if value is None else str(value)


def _outcomes(runs: Mapping[str, RunFiles]) -> list[tuple[str, list[str]]]:
    """Return rows of numbers, one of each run, without those that no run has."""
    rows: dict[str, list[str]] = {}
    for files in runs.values():
        model, ppo = evaluation.final_model(files), files.summaries.get("ppo")
        evaluated = files.summaries.get("evaluate")
        values = {
            "PPO iterations": figure(len(files.metrics.get("ppo", ())) or None),
            "training reward, last five iterations": figure(number(ppo, "reward_last")),
            "held-out reward": figure(number(evaluated, "models", model, "reward_mean")),
            "gold score": figure(number(evaluated, "models", model, "gold_mean")),
            "win rate against its SFT": _win_rate(evaluation.win_rate(files)),
            "KL to the reference, nats": figure(number(ppo, "kl_last")),
            "reward model accuracy": figure(number(files.summaries.get("reward"), "accuracy")),
            "warnings of guards": figure(len(files.warnings)),
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    return [(name, row) for name, row in rows.items() if set(row) != {figure(None)}]


def _win_rate(measured: tuple[float, float, float] | None) -> str:
    """Return a win rate with its interval, which older runs lack where all prompts tie."""
    if measured is None:
        return figure(None)
    rate, low, high = measured
    return f"{rate:.2f}" + ("" if low == high else f" ({low:.2f} to {high:.2f})")


def win_rates(runs: Mapping[str, RunFiles]) -> Iterator[WinRate]:
    """Yield the win rate of each two runs on the prompts that evaluate has given both.

    Answers are those of each run's final model. Their gold scores are compared where both have
    them, else the rewards, where one reward model gave both. The interval is Wilson's (1927).
    """
    scored = {name: _scores(files) for name, files in runs.items()}
    for (first, ours), (second, theirs) in combinations(scored.items(), 2):
        same_model = None is not _reward_model(runs[first]) == _reward_model(runs[second])
        for score in ("gold", *(("reward",) if same_model else ())):
            outcomes = Counter(
                (mine > other) + (mine == other) / 2
                for prompt in ours.keys() & theirs.keys()
                if (mine := number(ours[prompt], score)) is not None
                and (other := number(theirs[prompt], score)) is not None
            )
            if num := outcomes.total():
                value = sum(outcome * count for outcome, count in outcomes.items()) / num
                yield WinRate(first, second, score, num, value, wilson(value, num))
                break


def wilson(share: float, num: int) -> tuple[float, float]:
    """Return Wilson's 95% interval of a share of ``num``."""
    middle = share + _Z**2 / (2 * num)
    half = _Z * math.sqrt(share * (1 - share) / num + _Z**2 / (4 * num**2))
    scale = 1 + _Z**2 / num
    return (middle - half) / scale, (middle + half) / scale


def _scores(files: RunFiles) -> dict[str, Record]:
    """Return the final model's answer to each held-out prompt."""
    model = evaluation.final_model(files)
    answers = ((record.get("prompt"), record.get(model)) for record in files.samples)
    return {str(prompt): answer for prompt, answer in answers if is_mapping(answer)}


def _reward_model(files: RunFiles) -> str | None:
    return files.option("reward.path")
