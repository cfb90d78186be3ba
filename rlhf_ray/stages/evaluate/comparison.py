"""The compared models in numbers: means, win rates between all of them, Elo, instructions."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import numpy as np

from rlhf_ray.config.rewards import PairJudgeConfig
from rlhf_ray.data.datasets.instruction_checks import passes
from rlhf_ray.data.datasets.instructions import Instruction
from rlhf_ray.driver.metrics import mean_score
from rlhf_ray.errors import DataError
from rlhf_ray.observability.progress import Bar
from rlhf_ray.rewards.judge_pairs import Pair, PairJudge
from rlhf_ray.stages.evaluate.answers import SAMPLES_PER_INSTRUCTION, Answers, Sample
from rlhf_ray.stages.evaluate.models import SFT
from rlhf_ray.stages.evaluate.ranking import (
    Estimate,
    elo,
    outcomes_of_pairs,
    outcomes_of_scores,
    win_rates,
)

Samples = Mapping[str, Sequence[Sample]]
"""Model -> its answers to the held-out prompts, in one order."""

SCORES = ("reward", "gold", "rouge")
"""Scores that a sample can have."""
OUTCOMES: Mapping[str, float | None] = {"a": 1.0, "b": 0.0, "order": 0.5, "unread": None}
"""Verdict of the judge -> the first one's outcome; one that follows the order prefers neither."""
PAIRS_AT_ONCE = 64
"""Pairs that the judge is asked about between two moves of the bar."""


def outcomes_by_score(samples: Samples, score: str) -> np.ndarray:
    """Each model against each other, `_MMN`: the higher score wins."""
    return outcomes_of_scores(
        np.array([[row[score] for row in rows] for rows in samples.values()], dtype=float)
    )


async def outcomes_by_judge(settings: PairJudgeConfig, samples: Samples, bar: Bar) -> np.ndarray:
    """Each model against each other, `_MMN`, by a language model; equal texts are ties unasked.

    Raises:
        RlhfError: the judge stayed down, or gave no verdict where that is an error.
    """
    judge = PairJudge("evaluate.judge", settings)
    models = list(samples.values())
    found = []
    for first, second in combinations(range(len(models)), 2):
        outcomes: list[float | None] = [0.5] * len(models[first])
        rows = zip(models[first], models[second], strict=True)
        pairs = {
            place: Pair(a["prompt"], a["text"], b["text"])
            for place, (a, b) in enumerate(rows)
            if a["text"] != b["text"]
        }
        bar.advance(len(outcomes) - len(pairs))
        places = list(pairs)
        for start in range(0, len(places), PAIRS_AT_ONCE):
            part = places[start : start + PAIRS_AT_ONCE]
            verdicts = await judge.verdicts([pairs[place] for place in part])
            for place, verdict in zip(part, verdicts, strict=True):
                outcomes[place] = OUTCOMES[verdict]
            bar.advance(len(part))
        found.append((first, second, outcomes))
    return outcomes_of_pairs(len(models), found)


def summarize(
    samples: Samples, outcomes: Mapping[str, np.ndarray], resamples: int, seed: int
) -> dict[str, Any]:
    """Means of each model, win rates and ratings by each judge; its first one decides `win_rate`.

    ``win_rate`` is that of ppo over sft, or of the last model where ppo is not compared. A response
    without a score counts in no mean, and its prompt in no win rate.

    Args:
        samples: of every model, sft first.
        outcomes: judge -> `_MMN`, in the order of the models.
        resamples: of the prompts, for the intervals.
        seed: of the resampling.

    Raises:
        RlhfError: nothing is left to compare.
    """
    names = list(samples)
    judges = {
        judge: _judged(names, outcomes_MMN, resamples, seed)
        for judge, outcomes_MMN in outcomes.items()
    }
    models: dict[str, dict[str, Any]] = {name: _means(rows) for name, rows in samples.items()}
    judge, judged = next(iter(judges.items()))
    for name in names[1:]:
        models[name]["win_rate"] = judged["win_rates"][name][SFT]
        _require_known(judge, name, models[name]["win_rate"], len(samples[name]))
    final = "ppo" if "ppo" in models else names[-1]
    return {
        "models": models,
        "win_rate": models[final]["win_rate"],
        "judge": judge,
        "judges": judges,
    }


def follow(
    instructions: Sequence[Instruction], answers: Mapping[str, Answers]
) -> list[dict[str, Any]]:
    """Share of each model's answers that pass, and the first of them, for each instruction."""
    rows = []
    for index, instruction in enumerate(instructions):
        row: dict[str, Any] = {"prompt": instruction.prompt, "check": instruction.check}
        row |= {"args": dict(instruction.args), "models": {}}
        for name, given in answers.items():
            first = index * SAMPLES_PER_INSTRUCTION
            texts = given.instructed[first : first + SAMPLES_PER_INSTRUCTION]
            passed = [passes(text, instruction.check, instruction.args) for text in texts]
            row["models"][name] = {"pass_rate": fmean(passed), "text": texts[0]}
        rows.append(row)
    return rows


def _judged(
    names: Sequence[str], outcomes_MMN: np.ndarray, resamples: int, seed: int
) -> dict[str, Any]:
    rates, ratings = (estimate(outcomes_MMN, resamples, seed) for estimate in (win_rates, elo))
    return {
        "win_rates": {
            name: {
                other: _number(rates, (row, column))
                for column, other in enumerate(names)
                if column != row
            }
            for row, name in enumerate(names)
        },
        "elo": {name: _number(ratings, (place,)) for place, name in enumerate(names)},
    }


def _number(estimate: Estimate, place: tuple[int, ...]) -> dict[str, Any] | None:
    """A number and its interval; None where nothing is known."""
    value, low, high = (
        float(part[place]) for part in (estimate.value, estimate.low, estimate.high)
    )
    return None if np.isnan(value) else {"value": value, "ci95": [low, high]}


def _means(rows: Sequence[Sample]) -> dict[str, Any]:
    return {
        f"{score}_mean": mean_score([row[score] for row in rows])
        for score in SCORES
        if score in rows[0]
    }


def _require_known(judge: str, name: str, win_rate: Any, num_prompts: int) -> None:
    if win_rate is not None:
        return
    if judge == "judge":
        raise DataError(
            f"For none of the {num_prompts} held-out prompts did evaluate.judge say which of the "
            f"answers of {SFT} and {name} is better, in a form that its pattern finds; look at "
            "what it answers, and change template or pattern"
        )
    raise DataError(
        f"For none of the {num_prompts} held-out prompts do the sources of rewards have a score "
        f"of both models' responses ({SFT} and {name}); see docs/rewards.md on missing scores"
    )
