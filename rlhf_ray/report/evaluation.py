"""The report's section on compared models: ranking, win rates, instructions followed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_ray.report.data import Record, RunFiles, number

_NUMBERS = {
    "reward_mean": "reward",
    "gold_mean": "gold score",
    "rouge_mean": "ROUGE-L",
    "perplexity": "perplexity",
    "instruction_pass_rate": "instructions followed",
}
"""Heading of each number that the summary has of a model."""

_JUDGES = {
    "gold": "the gold score",
    "reward": "the reward",
    "rouge": "ROUGE-L",
    "judge": "a language model",
    "people": "people",
}


@dataclass(frozen=True)
class Rank:
    """A model's rating."""

    model: str
    elo: float
    interval: tuple[float, float]
    left: float
    """Start of the interval, in percent of the scale's width."""
    width: float
    """Width of the interval, in percent."""
    position: float
    """Position of the rating, in percent."""


@dataclass(frozen=True)
class Judged:
    """The comparison of all models by one judge."""

    judge: str
    """Display name of the judge."""
    ranks: Sequence[Rank]
    """Ratings, the best model first."""
    models: Sequence[str]
    """Models in the order of rows and columns."""
    rows: Sequence[Sequence[Record | None]]
    """Win rate of the row's model over the column's; None on the diagonal."""


def judged(files: RunFiles) -> list[Judged]:
    """Return ranking and win rates by every judge, starting with the judge of the win rate."""
    comparisons = []
    for judge, record in files.summaries.get("evaluate", {}).get("judges", {}).items():
        models = list(record["elo"])
        rates = record["win_rates"]
        rows = [[rates[row].get(column) for column in models] for row in models]
        comparisons.append(Judged(judge_title(judge), _ranks(record["elo"]), models, rows))
    return comparisons


def judge_title(judge: str) -> str:
    """Return the display name of a judge."""
    return _JUDGES.get(judge, judge)


def numbers(files: RunFiles) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Return headings and each model's numbers, without numbers that no model has."""
    models: Mapping[str, Record] = files.summaries.get("evaluate", {}).get("models", {})
    keys = [key for key in _NUMBERS if any(key in model for model in models.values())]
    return [_NUMBERS[key] for key in keys], [
        (name, [number(model, key) for key in keys]) for name, model in models.items()
    ]


def instructions(files: RunFiles) -> list[Record]:
    """Return each instruction with every model's pass rate and first answer."""
    return [
        {
            "prompt": record.get("prompt", ""),
            "check": " ".join(
                [record["check"].replace("_", " "), *map(str, (record.get("args") or {}).values())]
            ),
            "models": record["models"],
        }
        for record in files.instructions
        if record.get("models") and record.get("check")
    ]


def final_model(files: RunFiles) -> str:
    """Return the model whose win rate was measured."""
    models = list(files.summaries.get("evaluate", {}).get("models", ()))
    return "ppo" if "ppo" in models or not models else models[-1]


def win_rate(files: RunFiles) -> tuple[float, float, float] | None:
    """Return the final model's win rate against SFT and the ends of its 95% interval."""
    measured = files.summaries.get("evaluate", {}).get("win_rate")
    return (measured["value"], *measured["ci95"]) if measured else None


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
