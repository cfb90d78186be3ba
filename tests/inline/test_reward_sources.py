"""THE loop with several sources: combined over the batch, running moments in every commit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeScorer
from harness import Harness, make_config

from rlhf_ray.config import Config, resolve
from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.errors import ActorFailure, DivergenceError
from rlhf_ray.types import RawScores, Shard

SOURCES = [
    {"type": "model", "scale": "running", "baseline": 0.5},
    {"type": "rouge", "name": "length", "weight": -0.25, "clip": 4.0},
]


class TwoSources(FakeScorer):
    """The share of even tokens; and the length, which does not apply to even positions."""

    async def score(self, shard: Shard) -> RawScores:
        even = await super().score(shard)
        lengths = (None if r.position % 2 == 0 else len(r.response_ids) for r in shard.rollouts)
        return {**even, "length": tuple(lengths)}


def config_of(folder: Path, **ppo: Any) -> Config:
    config = make_config(folder, **ppo)
    return resolve(config.model_dump() | {"rewards": SOURCES})


def harness(folder: Path, *engines: FakeEngine, **ppo: Any) -> Harness:
    return Harness(config_of(folder, **ppo), engines, scorer=TwoSources)


def test_each_source_is_told_of_and_missing_scores_are_counted(tmp_path: Path) -> None:
    run = harness(tmp_path, iterations=2)
    summary = run.run()
    for record in run.metrics():
        lengths = record["objective/scores/length"]  # of the four odd positions of eight
        assert record["objective/missing/length"] == 4
        assert record["objective/missing/model"] == 0
        expected = record["objective/scores/model"] - 0.25 * lengths / 2
        assert record["objective/scores"] == pytest.approx(expected)
    raw = [record["objective/scores"] for record in run.metrics()]
    assert summary["reward_last"] == pytest.approx(np.mean(raw))


def test_running_moments_survive_a_restart(tmp_path: Path) -> None:
    whole = harness(tmp_path / "whole")
    whole.run()
    broken = harness(tmp_path / "run", FakeEngine(fail_on_call=3 + 3 * 3 + 1))
    with pytest.raises(ActorFailure):
        broken.run()
    saved = broken.checkpoints.latest()
    assert saved is not None
    count, total, squares = saved.progress["reward_moments"]["model"]
    assert count == 16  # two iterations of eight
    assert total**2 <= count * squares
    assert set(saved.progress["reward_moments"]) == {"model"}  # the other is not scaled
    resumed = harness(tmp_path / "run")
    resumed.run()
    assert resumed.metrics() == whole.metrics()
    assert resumed.records("eval") == whole.records("eval")


def test_a_batch_without_any_score_ends_the_run(tmp_path: Path) -> None:
    class Silent(FakeScorer):
        async def score(self, shard: Shard) -> RawScores:
            return {"model": (None,) * len(shard.rollouts)}

    run = Harness(make_config(tmp_path), scorer=Silent)
    with pytest.raises(DivergenceError, match=r"No source of rewards has a score for any of the 2"):
        run.run()
    assert run.saved() == []
