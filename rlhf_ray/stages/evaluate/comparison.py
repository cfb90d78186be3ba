"""The compared models in numbers: means, win rates between all of them, Elo, instructions."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any, TypedDict

import numpy as np

from rlhf_ray.config.rewards import PairJudgeConfig
from rlhf_ray.data.datasets.instruction_checks import passes
from rlhf_ray.data.datasets.instructions import Instruction
from rlhf_ray.driver.metrics import mean_score
from rlhf_ray.errors import DataError
from rlhf_ray.observability.progress import Bar
from rlhf_ray.people.preferences import Answer
from rlhf_ray.rewards.judge import Pair, PairJudge
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

Summary = dict[str, Any]
"""What ``evaluate/summary.json`` holds."""

SCORES = ("reward", "gold", "rouge")
"""Scores that a sample can have."""
OUTCOMES: Mapping[str, float | None] = {"a": 1.0, "b": 0.0, "order": 0.5, "unread": None}
"""Verdict of the judge -> the first answer's outcome; a verdict that follows the order is a tie."""
PAIRS_AT_ONCE = 64
"""Pairs that the judge is asked about between two steps of the progress bar."""


class Interval(TypedDict):
    """A number with the ends of its 95% interval."""

    value: float
    ci95: list[float]


class Ranking(TypedDict):
    """One judge's ranking of the models."""

    win_rates: dict[str, dict[str, Interval | None]]
    """Model -> other model -> how often the first one wins; None where nothing is known."""
    elo: dict[str, Interval | None]


def outcomes_by_score(samples: Samples, score: str) -> np.ndarray:
    """Return each model's outcome against each other, `_MMN`: the higher score wins."""
    scores_MN = [[row.scores[score] for row in rows] for rows in samples.values()]
    return outcomes_of_scores(np.array(scores_MN, dtype=float))


async def outcomes_by_judge(settings: PairJudgeConfig, samples: Samples, bar: Bar) -> np.ndarray:
    """Return each model's outcome against each other, `_MMN`, as a language model judges.

    Equal texts are ties; the judge is not asked about them.

    Raises:
        RlhfError: the judge stayed unavailable, or gave no verdict where that is an error.
    """
    judge = PairJudge("evaluate.judge", settings)
    models = list(samples.values())
    results = []
    for first, second in combinations(range(len(models)), 2):
        outcomes: list[float | None] = [0.5] * len(models[first])
        rows = zip(models[first], models[second], strict=True)
        pairs = {
            index: Pair(a.prompt, a.text, b.text)
            for index, (a, b) in enumerate(rows)
            if a.text != b.text
        }
        bar.advance(len(outcomes) - len(pairs))
        indices = list(pairs)
        for start in range(0, len(indices), PAIRS_AT_ONCE):
            chunk = indices[start : start + PAIRS_AT_ONCE]
            verdicts = await judge.verdicts([pairs[index] for index in chunk])
            for index, verdict in zip(chunk, verdicts, strict=True):
                outcomes[index] = OUTCOMES[verdict]
            bar.advance(len(chunk))
        results.append((first, second, outcomes))
    return outcomes_of_pairs(len(models), results)


def outcomes_by_people(answers: Iterable[Answer], samples: Samples) -> np.ndarray:
    """Return each model's outcome against each other, `_MMN`, as people ranked these very texts.

    Of several people the mean counts; both bad is a tie. Pairs that nobody ranked are not known, so
    neither are equal texts, which are not shown: as ties they would outweigh the ranked ones.
    """
    given: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for answer in answers:
        if answer.preferred == "skip":
            continue
        outcome = {"first": 1.0, "second": 0.0}.get(answer.preferred, 0.5)
        pair = answer.pair
        given[pair.prompt, pair.first.text, pair.second.text].append(outcome)
        given[pair.prompt, pair.second.text, pair.first.text].append(1 - outcome)
    models = list(samples.values())
    results = []
    for first, second in combinations(range(len(models)), 2):
        rows = zip(models[first], models[second], strict=True)
        known = [given.get((a.prompt.text, a.text, b.text)) for a, b in rows]
        results.append((first, second, [fmean(each) if each else None for each in known]))
    return outcomes_of_pairs(len(models), results)


def summarize(
    samples: Samples, outcomes: Mapping[str, np.ndarray], resamples: int, seed: int
) -> Summary:
    """Compute means of each model, and win rates and ratings by each judge.

    ``win_rate`` is the first judge's, of ppo over sft, or of the last model where ppo is not
    compared. A response without a score counts in no mean, and its prompt in no win rate.

    Raises:
        RlhfError: nothing is left to compare.
    """
    names = list(samples)
    judges = {
        judge: _ranking(names, outcomes_MMN, resamples, seed)
        for judge, outcomes_MMN in outcomes.items()
    }
    models: dict[str, dict[str, object]] = {name: _means(rows) for name, rows in samples.items()}
    judge, ranking = next(iter(judges.items()))
    for name in names[1:]:
        win_rate = ranking["win_rates"][name][SFT]
        if win_rate is None:
            raise _nothing_known(judge, name, len(samples[name]))
        models[name]["win_rate"] = win_rate
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
    """Return for each instruction the share of each model's answers that pass, and the first."""
    rows = []
    for index, instruction in enumerate(instructions):
        row: dict[str, Any] = {"prompt": instruction.prompt, "check": instruction.check}
        row |= {"args": dict(instruction.args), "models": {}}
        for name, answered in answers.items():
            first = index * SAMPLES_PER_INSTRUCTION
            texts = answered.instructed[first : first + SAMPLES_PER_INSTRUCTION]
            passed = [passes(text, instruction.check, instruction.args) for text in texts]
            row["models"][name] = {"pass_rate": fmean(passed), "text": texts[0]}
        rows.append(row)
    return rows


def _ranking(names: Sequence[str], outcomes_MMN: np.ndarray, resamples: int, seed: int) -> Ranking:
    rates, ratings = (estimate(outcomes_MMN, resamples, seed) for estimate in (win_rates, elo))
    return {
        "win_rates": {
            name: {
                other: _interval(rates, (row, column))
                for column, other in enumerate(names)
                if column != row
            }
            for row, name in enumerate(names)
        },
        "elo": {name: _interval(ratings, (row,)) for row, name in enumerate(names)},
    }


def _interval(estimate: Estimate, index: tuple[int, ...]) -> Interval | None:
    """Return a number and its interval; None where nothing is known."""
    arrays = (estimate.value, estimate.low, estimate.high)
    value, low, high = (float(array[index]) for array in arrays)
    return None if np.isnan(value) else {"value": value, "ci95": [low, high]}


def _means(rows: Sequence[Sample]) -> dict[str, object]:
    return {
        f"{score}_mean": mean_score([row.scores[score] for row in rows])
        for score in SCORES
        if score in rows[0].scores
    }


def _nothing_known(judge: str, name: str, num_prompts: int) -> DataError:
    if judge == "judge":
        return DataError(
            f"For none of the {num_prompts} held-out prompts did evaluate.judge say which of the "
            f"answers of {SFT} and {name} is better, in a form that its pattern finds; look at "
            "what it answers, and change template or pattern"
        )
    if judge == "people":
        return DataError(
            f"None of the verdicts of people is on these answers of {SFT} and {name} to the "
            f"{num_prompts} held-out prompts; rank the run's own evaluation (rlhf-ray rank), and "
            "evaluate the same models under the same settings"
        )
    return DataError(
        f"For none of the {num_prompts} held-out prompts do the sources of rewards have a score "
        f"of both models' responses ({SFT} and {name}); see docs/rewards.md on missing scores"
    )
