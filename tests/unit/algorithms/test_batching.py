import random

import pytest

from rlhf_ray.algorithms.batching import micro_batches


def padded(group: list[int], lengths: list[int]) -> int:
    return len(group) * max(lengths[row] for row in group)


def test_rows_of_like_length_go_together() -> None:
    # Longest first: 9 and 8 pad to 18, 4 4 3 to 12, one more 2 would make 16.
    assert micro_batches([4, 9, 3, 8, 4, 2], 18) == [[1, 3], [0, 4, 2, 5]]
    assert micro_batches([4, 9, 3, 8, 4, 2], 15) == [[1], [3], [0, 4, 2], [5]]


def test_a_row_that_is_too_long_goes_alone() -> None:
    assert micro_batches([3, 50, 3], 10) == [[1], [0, 2]]


def test_at_least_so_many_groups_are_made() -> None:
    sizes = [len(group) for group in micro_batches([1] * 8, 100, at_least=3)]
    assert sorted(sizes) == [2, 2, 4]  # 8 is halved, then a 4
    assert len(micro_batches([1, 1], 100, at_least=5)) == 2, "no group may be empty"
    assert micro_batches([], 10, at_least=2) == []


@pytest.mark.parametrize("seed", range(20))
def test_each_row_is_in_one_group_within_the_limit(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 40))]
    limit, at_least = rng.randint(30, 200), rng.randint(1, 8)
    groups = micro_batches(lengths, limit, at_least)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(group and padded(group, lengths) <= limit for group in groups)
    assert len(groups) >= min(at_least, len(lengths))
