"""The comparison of models in numbers, where some responses have no score."""

from typing import Any

import numpy as np
import pytest

from rlhf_ray.data.datasets.instructions import Instruction
from rlhf_ray.errors import DataError, DivergenceError
from rlhf_ray.stages.evaluate.answers import SAMPLES_PER_INSTRUCTION, Answers, Sample
from rlhf_ray.stages.evaluate.comparison import follow, outcomes_by_score, summarize
from rlhf_ray.types import Prompt


def sample(**scores: float | None) -> Sample:
    return Sample(Prompt("", "", ()), "", scores)


def samples(*rewards: float | None) -> list[Sample]:
    return [sample(reward=reward) for reward in rewards]


def compared(**models: list[Sample]) -> dict[str, Any]:
    """The summary of models by their rewards."""
    return summarize(models, {"reward": outcomes_by_score(models, "reward")}, 100, 0)


def test_missing_scores_count_in_no_mean_and_no_win_rate() -> None:
    found = compared(sft=samples(1.0, 2.0, None, 0.0), ppo=samples(2.0, 2.0, 5.0, None))
    assert found["models"]["sft"]["reward_mean"] == 1.0  # of 1, 2, 0
    assert found["models"]["ppo"]["reward_mean"] == 3.0  # of 2, 2, 5
    assert found["win_rate"]["value"] == 0.75  # a win and a tie
    low, high = found["win_rate"]["ci95"]
    assert 0.5 <= low <= high <= 1.0


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(DataError, match="For none of the 2 held-out prompts do the sources"):
        compared(sft=samples(1.0, None), ppo=samples(None, 1.0))
    with pytest.raises(DivergenceError, match="has a score for any of the 2 held-out responses"):
        compared(sft=samples(None, None), ppo=samples(1.0, 1.0))


def test_every_model_meets_every_other_and_ppo_gives_the_win_rate() -> None:
    found = compared(sft=samples(0, 0, 0, 0), ppo=samples(1, 1, 1, 0), other=samples(2, 0, 0, -1.0))
    rates = found["judges"]["reward"]["win_rates"]
    assert rates["ppo"]["sft"]["value"] == 0.875  # three wins, a tie
    assert rates["other"]["ppo"]["value"] == rates["other"]["sft"]["value"] - 0.25 == 0.25
    assert rates["ppo"]["other"]["value"] == 0.75
    assert set(rates["sft"]) == {"ppo", "other"}
    assert found["win_rate"] == found["models"]["ppo"]["win_rate"] == rates["ppo"]["sft"]
    ratings = {name: rating["value"] for name, rating in found["judges"]["reward"]["elo"].items()}
    assert ratings["sft"] == 1000
    assert ratings["ppo"] > ratings["other"]


def test_the_first_judge_gives_the_win_rate_and_the_others_are_reported() -> None:
    models = {
        "sft": [sample(reward=1.0, gold=0.0)] * 3,
        "dpo": [sample(reward=0.0, gold=1.0)] * 3,
    }
    outcomes = {judge: outcomes_by_score(models, judge) for judge in ("gold", "reward")}
    found = summarize(models, outcomes, 100, 0)
    assert found["judge"] == "gold"
    assert found["win_rate"]["value"] == 1.0
    assert found["judges"]["reward"]["win_rates"]["dpo"]["sft"]["value"] == 0.0
    assert found["models"]["dpo"]["gold_mean"] == 1.0


def test_a_judge_that_decides_nothing_is_refused() -> None:
    models = {"sft": samples(1.0), "ppo": samples(1.0)}
    with pytest.raises(DataError, match=r"did evaluate\.judge say which of the answers of sft and"):
        summarize(models, {"judge": np.full((2, 2, 1), np.nan)}, 100, 0)


def test_each_instruction_reports_the_share_of_answers_that_follow_it() -> None:
    instructions = [
        Instruction("p", "words_begin_with", {"letter": "a"}),
        Instruction("q", "lower_case"),
    ]
    texts = ["an ant", "a bee", "ants", "", "small", "Large", "LARGE", "7"]
    assert len(texts) == 2 * SAMPLES_PER_INSTRUCTION
    first, second = follow(instructions, {"sft": Answers([], texts)})
    assert first["models"]["sft"] == {"pass_rate": 0.5, "text": "an ant"}
    assert second["models"]["sft"] == {"pass_rate": 0.25, "text": "small"}
    assert (second["prompt"], second["check"], second["args"]) == ("q", "lower_case", {})
