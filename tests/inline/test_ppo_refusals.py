"""Refusals of the loop, after which nothing is committed."""

import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import FakePolicy
from harness import Harness, make_config, stale

from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.errors import ActorFailure, DivergenceError, RlhfError, WeightSyncError
from rlhf_ray.generators.pool import GeneratorPool
from rlhf_ray.types import Shard, ShardRequest


class _Pool(GeneratorPool, ABC):
    """A pool that spoils what comes from version 2, the third iteration's."""

    async def generate(
        self, requests: Sequence[ShardRequest], *, or_newer: bool = False
    ) -> AsyncIterator[Shard]:
        shards = [shard async for shard in super().generate(requests, or_newer=or_newer)]
        whole_batch = len(requests) == 3
        if requests[0].version == 2 and whole_batch:
            shards = self.spoil(sorted(shards, key=lambda shard: shard.info.index))
        for shard in shards:
            yield shard

    @abstractmethod
    def spoil(self, shards: list[Shard]) -> list[Shard]: ...


class _Lost(_Pool):
    def spoil(self, shards: list[Shard]) -> list[Shard]:
        return shards[:-1]


class _Doubled(_Pool):
    def spoil(self, shards: list[Shard]) -> list[Shard]:
        return [shards[0], *shards]


class _Swapped(_Pool):
    """The requested number of samples, but one shard twice and another never."""

    def spoil(self, shards: list[Shard]) -> list[Shard]:
        return [shards[0], shards[0], shards[2]]


class _Stale(_Pool):
    def spoil(self, shards: list[Shard]) -> list[Shard]:
        return [stale(shards[0], 1), *shards[1:]]


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (_Lost, r"6 samples \(6 distinct\) where 8 were requested"),
        (_Doubled, r"11 samples \(8 distinct\) where 8 were requested"),
        (_Swapped, r"8 samples \(5 distinct\) where 8 were requested"),
        (_Stale, r"samples of versions \[1\], 2 is current"),
    ],
)
def test_a_batch_that_is_not_whole_is_refused(
    pool: type[GeneratorPool], message: str, tmp_path: Path
) -> None:
    harness = Harness(make_config(tmp_path), pool=pool)
    with pytest.raises(RlhfError, match=message):
        harness.run()
    _assert_stopped_after_two(harness)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ({"loss": math.nan}, DivergenceError, r"Iteration 3: loss/policy_avg is not finite"),
        ({"loss": math.inf}, DivergenceError, r"Iteration 3: loss/policy_avg is not finite"),
        ({"gap": 0.02}, WeightSyncError, r"Shard 0 \(version 2\): .* differ by 0.02 nats"),
        ({"gap": math.nan}, WeightSyncError, r"Shard 0 \(version 2\): .* differ by nan nats"),
        ({"lose": 1}, RlhfError, r"7 of the 8 samples"),
    ],
)
def test_an_iteration_that_goes_wrong_is_not_committed(
    fault: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path, guards={"non_finite": {"action": "stop"}})
    harness = Harness(config, policy=FakePolicy(fault_at=3, **fault))
    with pytest.raises(error, match=message):
        harness.run()
    _assert_stopped_after_two(harness)


def test_a_generator_that_fails_ends_the_run_with_its_own_error(tmp_path: Path) -> None:
    # Two calls for the proof, one for the first evaluation, three for each of two iterations.
    harness = Harness(make_config(tmp_path), [FakeEngine(fail_on_call=11)])
    with pytest.raises(ActorFailure, match="fails on call 11"):
        harness.run()
    _assert_stopped_after_two(harness)


def _assert_stopped_after_two(harness: Harness) -> None:
    assert [event for event in harness.events if event[0] == "commit"][-1] == ("commit", 2)
    assert harness.events.count(("publish", 3)) == 0
    assert harness.saved() == [2]
    saved = harness.checkpoints.latest()
    assert saved is not None
    assert saved.version == saved.progress["iteration"] == 2
    assert len(harness.metrics()) == 2


def test_the_gap_bound_is_calibrated_once_and_outlives_a_restart(tmp_path: Path) -> None:
    Harness(make_config(tmp_path, iterations=2)).run()
    saved = Harness(make_config(tmp_path)).checkpoints.latest()
    assert saved is not None
    assert saved.progress["gap_bound"] == 1e-4  # the floor of float32: the fakes agree to rounding
    # Calibrated anew, 5e-3 would pass: ten times its own mean is above it.
    resumed = Harness(make_config(tmp_path), policy=FakePolicy(fault_at=1, gap=5e-3))
    with pytest.raises(WeightSyncError, match=r"bound is 0\.0001"):
        resumed.run()
