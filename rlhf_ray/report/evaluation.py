"""The report's part on the compared models: ranking, who beats whom, instructions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.report.data import Record, RunFiles, number

_NUMBERS = {
    "reward_mean": "reward",
    "gold_mean": "gold score",
    "rouge_mean": "ROUGE-L",
    "perplexity": "perplexity",
    "instruction_pass_rate": "instructions followed",
}
"""Number of a model in the summary -> its heading."""

_JUDGES = {
    "gold": "the gold score",
    "reward": "the reward",
    "rouge": "ROUGE-L",
    "judge": "a language model",
}


@dataclass(frozen=True)
class Rank:
    """A model's rating."""

    model: str
    elo: float
    interval: tuple[float, float]
    left: float
    """Where the interval begins, in percent of the picture's width, ..."""
    width: float
    """... how wide it is, ..."""
    place: float
    """... and where the rating is."""


@dataclass(frozen=True)
class Judged:
    """The comparison by one judge."""

    judge: str
    """In words."""
    ranks: Sequence[Rank]
    """The best model first."""
    models: Sequence[str]
    """In the order of rows and columns."""
    rows: Sequence[Sequence[Mapping[str, Any] | None]]
    """Win rate of the row's model over the column's; None where there is none."""


def judged(files: RunFiles) -> list[Judged]:
    """Ranking and win rates by every judge, the one of the win rate first."""
    found = []
    for judge, record in files.summaries.get("evaluate", {}).get("judges", {}).items():
        models = list(record["elo"])
        rates = record["win_rates"]
        rows = [[rates[row].get(column) for column in models] for row in models]
        found.append(Judged(_JUDGES[judge], _ranks(record["elo"]), models, rows))
    return found


def numbers(files: RunFiles) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Headings, and the numbers of each model under them; what no model has is left out."""
    models: Mapping[str, Record] = files.summaries.get("evaluate", {}).get("models", {})
    keys = [key for key in _NUMBERS if any(key in model for model in models.values())]
    return [_NUMBERS[key] for key in keys], [
        (name, [number(model, key) for key in keys]) for name, model in models.items()
    ]


def instructions(files: RunFiles) -> list[dict[str, Any]]:
    """Every instruction with the share of each model's answers that follow it, and an answer."""
    return [
        {
            "prompt": record.get("prompt", ""),
            "check": " ".join([record["check"].replace("_", " "), *_values(record)]),
            "models": record["models"],
        }
        for record in files.instructions
        if record.get("models") and record.get("check")
    ]


def _values(record: Record) -> list[str]:
    return [str(value) for value in (record.get("args") or {}).values()]


def _ranks(elo: Mapping[str, Record]) -> list[Rank]:
    ends = [end for rating in elo.values() for end in (*rating["ci95"], rating["value"])]
    lowest, span = min(ends), max(max(ends) - min(ends), 1.0)

    def percent(value: float) -> float:
        return 100 * (value - lowest) / span

    ranks = []
    for name, rating in sorted(elo.items(), key=lambda item: -item[1]["value"]):
        low, high = rating["ci95"]
        left, width = percent(low), percent(high) - percent(low)
        ranks.append(
            Rank(name, rating["value"], (low, high), left, width, percent(rating["value"]))
        )
    return ranks
