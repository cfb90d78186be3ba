"""The penalty of responses that did not end by themselves."""

from typing import Any

import pytest

from rlhf_ray.config.rewards import RougeSourceConfig
from rlhf_ray.driver.scoring import joined, score_metrics, with_scores
from rlhf_ray.types import Gap, RawScores, ScoredShard, Shard, ShardInfo


def source(**keys: Any) -> list[RougeSourceConfig]:
    return [RougeSourceConfig(type="rouge", name="a", **keys)]


def shard(first: int, raw: tuple[float | None, ...], stopped: tuple[bool, ...]) -> ScoredShard:
    count = len(raw)
    positions = tuple(range(first, first + count))
    info = ShardInfo(first, positions, (1,) * count, stopped, (0,) * count)
    scores: RawScores = {"a": raw}
    return ScoredShard(Shard(info, None), scores, None, None, None, Gap(0.0, 0.0, count))


BATCH = [
    shard(0, (1.0, 3.0), (True, False)),
    shard(2, (5.0, None, 9.0), (False, False, True)),
]


def test_it_comes_off_the_score_of_those_alone() -> None:
    filled, _ = with_scores(BATCH, source(), {}, missing_eos_penalty=2.0)
    # The fourth has no score of its own: the mean of the others, 4.5, less the penalty.
    assert [scored.scores for scored in filled] == [(1.0, 1.0), (3.0, 2.5, 9.0)]


def test_it_comes_after_baseline_and_clip() -> None:
    filled, _ = with_scores(BATCH, source(baseline=3.0, clip=2.0), {}, missing_eos_penalty=5.0)
    # Clipped to -2, 0, 2, and 2; their mean .5; a score below the clip is what was asked for.
    assert [scored.scores for scored in filled] == [(-2.0, -5.0), (-3.0, -4.5, 2.0)]


def test_running_moments_and_raw_scores_do_not_know_of_it() -> None:
    plain, moments = with_scores(BATCH, source(scale="running"), {})
    penalised, same = with_scores(BATCH, source(scale="running"), {}, missing_eos_penalty=5.0)
    assert moments == same == {"a": (4.0, 18.0, 116.0)}
    gone = [
        before - after
        for one, other in zip(plain, penalised, strict=True)
        for before, after in zip(one.scores, other.scores, strict=True)
    ]
    assert gone == pytest.approx([0, 5, 5, 5, 0])
    raw = joined([scored.raw_scores for scored in penalised])
    assert score_metrics(source(), raw)["objective/scores"] == 4.5
