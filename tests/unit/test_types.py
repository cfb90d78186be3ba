import numpy as np
import pytest

from rlhf_ray.types import Prompt, Rollout


def response(tokens: list[int]) -> Rollout:
    ids = np.array(tokens, dtype=np.int64)
    return Rollout(0, Prompt("0", "", ()), ids, np.zeros(len(ids), np.float32), "stop", 0, "")


@pytest.mark.parametrize(
    ("tokens", "repeats"),
    [
        ([7, 7, 7, 7], True),
        ([1, 7, 7, 7, 7, 2], True),
        ([7, 7, 7, 1, 7], False),  # four of them, but only three in a row
        ([7, 8, 7, 8, 7, 8, 7, 8], False),
        ([7, 7, 7], False),
        ([7], False),
        ([], False),
    ],
)
def test_four_identical_tokens_in_a_row_are_repetition(tokens: list[int], repeats: bool) -> None:
    assert response(tokens).repeats_a_token is repeats


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([1, 2, 3, 4], 1.0),
        ([1, 2, 1, 2, 1], 0.5),  # 12, 21, 12, 21
        ([5, 5, 5, 5, 5], 0.25),  # the same one four times
        ([1, 2], 1.0),
        ([1], 1.0),
        ([], 1.0),
    ],
)
def test_distinct_bigrams_by_hand(tokens: list[int], share: float) -> None:
    assert response(tokens).distinct_bigrams == share
