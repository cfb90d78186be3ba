import pytest

from rlhf_ray.data.reading.mixture import interleave


def test_without_weights_every_row_comes_once_and_sets_are_spread_evenly() -> None:
    order = interleave([6, 2, 1], [None, None, None]).tolist()
    assert sorted(order) == list(range(9))
    # Depths: (.5, 1.5 ... 5.5) / 6; .25, .75; .5.
    assert order == [0, 1, 6, 2, 8, 3, 4, 7, 5]


@pytest.mark.parametrize(
    ("sizes", "weights", "counts"),
    [
        ([100, 100], [3.0, 1.0], [100, 33]),
        ([10, 100], [0.5, 0.5], [10, 10]),
        ([3, 7, 70], [0.3, 0.7, 1.0], [3, 7, 10]),
        ([5], [0.1], [5]),
    ],
)
def test_weights_hold_until_a_set_is_used_up(
    sizes: list[int], weights: list[float | None], counts: list[int]
) -> None:
    order = interleave(sizes, weights)
    assert len(order) == len(set(order)) == sum(counts)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    for start, size, count in zip(starts, sizes, counts, strict=True):
        own = order[(order >= start) & (order < start + size)]
        assert own.tolist() == list(range(start, start + count))
