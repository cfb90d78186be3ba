"""Worked by hand: part = weight x clip((raw - baseline) / deviation), summed over sources."""

import math
from typing import Any

import pytest

from rlhf_ray.algorithms.whitening import Moments
from rlhf_ray.config.rewards import RougeSourceConfig
from rlhf_ray.errors import RlhfError
from rlhf_ray.rewards.combine import combine, raw_sums


def source(name: str, **keys: Any) -> RougeSourceConfig:
    return RougeSourceConfig(type="rouge", name=name, **keys)


def test_one_source_of_weight_one_is_the_score() -> None:
    combined = combine([source("a")], {"a": (1.5, -2.0)}, {})
    assert combined.scores == (1.5, -2.0)
    assert combined.moments == {}


def test_the_weighted_sum_after_baseline_and_clip() -> None:
    sources = [source("a", weight=2.0, baseline=1.0), source("b", weight=-0.5, clip=3.0)]
    raw = {"a": (1.5, 0.0), "b": (2.0, -10.0)}
    # 2 (1.5 - 1) - .5 (2) = 0;  2 (0 - 1) - .5 (-3) = -.5
    assert combine(sources, raw, {}).scores == (0.0, -0.5)
    # raw sums know neither baseline nor clip: 3 - 1; 0 + 5
    assert raw_sums(sources, raw) == [2.0, 5.0]


def test_a_clip_comes_after_scaling_and_after_the_baseline() -> None:
    # Deviation of 0, 2, 4 is 2 (unbiased): (x - 2) / 2 = -1, 0, 1, of which .5 is left.
    combined = combine(
        [source("a", baseline=2.0, scale="running", clip=0.5)], {"a": (0.0, 2.0, 4.0)}, {}
    )
    assert combined.scores == (-0.5, 0.0, 0.5)


def test_running_moments_are_of_the_whole_run() -> None:
    sources = [source("a", scale="running")]
    first = combine(sources, {"a": (0.0, 2.0)}, {})
    assert first.moments == {"a": Moments(2, 2.0, 4.0)}
    assert first.scores == pytest.approx((0.0, 2.0 / math.sqrt(2)))  # deviation sqrt 2
    second = combine(sources, {"a": (4.0,)}, first.moments)
    assert second.moments == {"a": Moments(3, 6.0, 20.0)}
    assert second.scores == (2.0,)  # 4 / 2, not centred: the sign of a score stays


@pytest.mark.parametrize("size", [1.0, -1e6])
def test_scores_apart_by_rounding_are_not_blown_up(size: float) -> None:
    raw = {"a": (size, size * (1 + 1.2e-7), size, size)}
    scores = combine([source("a", scale="running")], raw, {}).scores
    assert scores == pytest.approx(raw["a"])


@pytest.mark.parametrize("equal", [0.0, 0.1, -1e6])
def test_scores_that_are_all_equal_are_not_blown_up(equal: float) -> None:
    raw = {"a": (equal,) * 7}
    assert combine([source("a", scale="running")], raw, {}).scores == raw["a"]


def test_a_missing_score_leaves_the_weights_of_the_others() -> None:
    sources = [source("a", weight=2.0), source("b", weight=1.0)]
    raw = {"a": (1.0, None, 3.0), "b": (None, 5.0, 1.0)}
    assert combine(sources, raw, {}).scores == (2.0, 5.0, 7.0)
    assert raw_sums(sources, raw) == [2.0, 5.0, 7.0]


def test_a_response_without_any_score_gets_the_mean_of_the_others() -> None:
    sources = [source("a", scale="running"), source("b")]
    raw = {"a": (None, None, None), "b": (1.0, None, 4.0)}
    combined = combine(sources, raw, {})
    assert combined.scores == (1.0, 2.5, 4.0)
    assert combined.moments["a"] == Moments()  # what is missing moves no moment
    assert raw_sums(sources, raw) == [1.0, None, 4.0]


def test_no_score_at_all_is_refused() -> None:
    with pytest.raises(RlhfError, match="None of the 2 responses has a score from a, b"):
        combine([source("a"), source("b")], {"a": (None, None), "b": (None, None)}, {})
