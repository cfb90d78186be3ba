import pytest

from rlhf_ray.algorithms.repetition import distinct_bigrams, repeats_a_token


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
    assert repeats_a_token(tokens) is repeats


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
    assert distinct_bigrams(tokens) == share
