"""Tests of the target number of generators: a table of cases, and no change undoes the last.

Generation takes G seconds with one generator, G / n with n; everything else R seconds.
"""

import math
from itertools import pairwise

import pytest

from rlhf_ray.config.rollout import AutoscaleConfig
from rlhf_ray.generators.autoscale import next_target
from rlhf_ray.types import IdleShares


def seen(learners: float, generators: float, times: int = 2) -> list[IdleShares]:
    return [IdleShares(learners, generators, 0.0)] * times


@pytest.mark.parametrize(
    ("current", "learners", "generators", "wanted"),
    [
        (1, 0.6, 0.4, 2),  # G : R = 3 : 2, so 1.5 would balance them
        (2, 0.9, 0.1, 4),  # 18 would; twice as many is the most
        (4, 0.52, 0.48, 5),  # 4.33 would
        (4, 1.0, 0.0, 8),
        (2, 0.5, 0.5, 2),  # at the bound
        (4, 0.3, 0.7, 4),  # between the bounds nothing changes
        (4, 0.2, 0.8, 4),
        (4, 0.15, 0.85, 3),
        (6, 0.9, 0.1, 8),  # the most that there may be
        (2, 0.05, 0.95, 2),  # the fewest that there may be
    ],
)
def test_cases(current: int, learners: float, generators: float, wanted: int) -> None:
    settings = AutoscaleConfig(minimum=2 if current > 1 else 1, maximum=8, iterations=2)
    assert next_target(settings, current, seen(learners, generators)) == wanted


@pytest.mark.parametrize(
    ("current", "learners", "generators", "wanted"),
    [
        (2, 0.5, 0.0, 4),  # G : R = 2 : 1, so twice as many would balance them
        (4, 0.25, 0.0, 6),  # 5.33 would
        (2, 0.9, 0.0, 4),  # 20 would; twice as many is the most
        (4, 0.15, 0.0, 4),  # between the bounds nothing changes
        (4, 0.0, 0.35, 4),  # three would wait .13 of the time
        (4, 0.0, 0.45, 3),  # three wait .27 of it
        (1, 0.0, 0.99, 1),
    ],
)
def test_cases_where_batches_are_generated_ahead(
    current: int, learners: float, generators: float, wanted: int
) -> None:
    settings = AutoscaleConfig(minimum=1, maximum=8, iterations=2)
    idle = seen(learners, generators)
    assert next_target(settings, current, idle, is_ahead=True) == wanted


@pytest.mark.parametrize("work", [0.3, 1.0, 2.5, 7.0, 11.0, 30.0, 400.0])
@pytest.mark.parametrize("start", [1, 3, 16])
def test_it_settles_where_batches_are_generated_ahead(work: float, start: int) -> None:
    settings = AutoscaleConfig(minimum=1, maximum=16, iterations=1)
    path = [start]
    for _ in range(20):
        took_s = work / path[-1]
        idle = IdleShares(max(0.0, 1 - 1 / took_s), max(0.0, 1 - took_s), 0.0)
        path.append(next_target(settings, path[-1], [idle], is_ahead=True))
    assert path in (sorted(path), sorted(path, reverse=True))
    assert path[-1] == path[-2]
    assert path[-1] == 16 or work / path[-1] <= 1.25


def test_nothing_changes_before_enough_was_seen() -> None:
    settings = AutoscaleConfig(iterations=3)
    assert next_target(settings, 2, seen(0.9, 0.1, times=2)) == 2
    assert next_target(settings, 2, seen(0.9, 0.1, times=3)) == 4


def test_means_over_the_last_iterations_decide() -> None:
    settings = AutoscaleConfig(iterations=2)
    one_odd = [*seen(0.0, 1.0, times=5), *seen(0.9, 0.1, times=1), *seen(0.3, 0.7, times=1)]
    assert next_target(settings, 2, one_odd) == 3  # (.9 + .3) / 2 = .6, 3 would balance it
    assert next_target(settings, 2, [*seen(0.9, 0.1, times=1), *seen(0.05, 0.95, times=1)]) == 2


@pytest.mark.parametrize("work", [0.3, 1.0, 2.5, 7.0, 30.0, 400.0])
@pytest.mark.parametrize("start", [1, 3, 16])
def test_it_settles_and_stays(work: float, start: int) -> None:
    """The target is reached monotonically in a few steps, then kept, with G = work and R = 1."""
    settings = AutoscaleConfig(minimum=1, maximum=16, iterations=1)
    path = [start]
    for _ in range(20):
        learners = work / path[-1] / (work / path[-1] + 1)
        path.append(next_target(settings, path[-1], [IdleShares(learners, 1 - learners, 0.0)]))
    assert path[-1] == path[-2]
    steps = [math.copysign(1, b - a) for a, b in pairwise(path) if a != b]
    assert len(set(steps)) <= 1, f"went back and forth: {path}"
