import random
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.algorithms.micro_batches import PASS_TOKENS, balanced, micro_batches

CPU = torch.device("cpu")


def padded(group: list[int], lengths: list[int]) -> int:
    return len(group) * max(lengths[row] for row in group)


def cost(groups: list[list[int]], lengths: list[int]) -> int:
    return sum(padded(group, lengths) + PASS_TOKENS["cpu"] for group in groups)


def cuts(rows: list[int]) -> Iterator[list[list[int]]]:
    """All ways to cut rows into groups of neighbours."""
    for num_cuts in range(len(rows)):
        for places in combinations(range(1, len(rows)), num_cuts):
            bounds = [0, *places, len(rows)]
            yield [rows[first:last] for first, last in pairwise(bounds)]


def test_rows_of_like_length_go_together() -> None:
    # In one group 6 * 90 = 540 tokens; a second pass costs 24 and saves 4 * (90 - 40) = 200.
    assert micro_batches([40, 90, 30, 80, 40, 20], 1000, CPU) == [[1, 3], [0, 4, 2, 5]]
    # Four rows of 40 do not fit; 2 * 40 + 2 * 30 is less than 3 * 40 + 24.
    assert micro_batches([40, 90, 30, 80, 40, 24], 150, CPU) == [[1], [3], [0, 4], [2, 5]]


@pytest.mark.parametrize("seed", range(10))
def test_no_cut_costs_less(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 120) for _ in range(9)]
    longest_first = sorted(range(9), key=lambda row: (-lengths[row], row))
    found = micro_batches(lengths, 400, CPU)
    allowed = [
        groups
        for groups in cuts(longest_first)
        if all(padded(group, lengths) <= 400 for group in groups)
    ]
    assert cost(found, lengths) == min(cost(groups, lengths) for groups in allowed)


def test_of_skewed_lengths_nine_in_ten_processed_tokens_are_real() -> None:
    rng = np.random.default_rng(0)
    lengths = [16 + int(length) for length in np.minimum(rng.geometric(1 / 32, 64), 256)]
    processed = sum(padded(group, lengths) for group in micro_batches(lengths, 100_000, CPU))
    assert sum(lengths) / processed > 0.93
    assert sum(lengths) / padded(list(range(64)), lengths) < 0.4, "in one group"


def test_a_row_that_is_too_long_goes_alone() -> None:
    assert micro_batches([3, 50, 3], 10, CPU) == [[1], [0, 2]]


def test_at_least_so_many_groups_are_made() -> None:
    sizes = [len(group) for group in micro_batches([1] * 8, 100, CPU, at_least=3)]
    assert sorted(sizes) == [2, 2, 4]  # 8 is halved, then a 4
    assert len(micro_batches([1, 1], 100, CPU, at_least=5)) == 2, "no group may be empty"
    assert micro_batches([], 10, CPU, at_least=2) == []


@pytest.mark.parametrize("seed", range(20))
def test_each_row_is_in_one_group_within_the_limit(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 40))]
    limit, at_least = rng.randint(30, 200), rng.randint(1, 8)
    groups = micro_batches(lengths, limit, CPU, at_least)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert all(group and padded(group, lengths) <= limit for group in groups)
    assert len(groups) >= min(at_least, len(lengths))


def test_a_gpu_takes_fewer_and_larger_passes() -> None:
    lengths = [40, 90, 30, 80, 40, 20]
    assert len(micro_batches(lengths, 1000, CPU)) == 2
    assert len(micro_batches(lengths, 1000, torch.device("cuda"))) == 1


def test_ranks_get_about_as_many_tokens() -> None:
    # 9 | 8, then 7 to the 8's, then 6 to the 9's, 3 to either (15, 15), 2 to the other.
    assert balanced([9, 2, 7, 6, 8, 3], 2) == [[0, 3, 5], [1, 2, 4]]
    assert balanced([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert balanced([1, 100], 2) == [[1], [0]]


@given(
    st.lists(st.integers(1, 300), min_size=4, max_size=40),
    st.integers(1, 4),
)
def test_no_rank_has_more_than_the_best_and_a_row(lengths: list[int], ranks: int) -> None:
    shares = balanced(lengths, ranks)
    assert sorted(row for share in shares for row in share) == list(range(len(lengths)))
    assert all(shares)
    loads = [sum(lengths[row] for row in share) for share in shares]
    assert max(loads) <= sum(lengths) / ranks + max(lengths)
    best = max(sum(lengths) / ranks, max(lengths))
    assert max(loads) <= (4 / 3) * max(best, sum(sorted(lengths)[-ranks - 1 :][:2]))
