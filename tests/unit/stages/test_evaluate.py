"""The comparison of models in numbers, where some responses have no score."""

from typing import Any

import pytest

from rlhf_ray.errors import DataError, DivergenceError
from rlhf_ray.stages.evaluate import summarize


def samples(*rewards: float | None) -> list[dict[str, Any]]:
    return [{"reward": reward} for reward in rewards]


def test_missing_scores_count_in_no_mean_and_no_win_rate() -> None:
    found = summarize(
        {"sft": samples(1.0, 2.0, None, 0.0), "ppo": samples(2.0, 2.0, 5.0, None)}, 100, 0
    )
    assert found["models"]["sft"]["reward_mean"] == 1.0  # of 1, 2, 0
    assert found["models"]["ppo"]["reward_mean"] == 3.0  # of 2, 2, 5
    assert found["win_rate"]["value"] == 0.75  # a win and a tie
    low, high = found["win_rate"]["ci95"]
    assert 0.5 <= low <= high <= 1.0


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(DataError, match="For none of the 2 held-out prompts do the sources"):
        summarize({"sft": samples(1.0, None), "ppo": samples(None, 1.0)}, 100, 0)
    with pytest.raises(DivergenceError, match="has a score for any of the 2 held-out responses"):
        summarize({"sft": samples(None, None), "ppo": samples(1.0, 1.0)}, 100, 0)
