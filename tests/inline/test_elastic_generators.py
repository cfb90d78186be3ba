"""Whole PPO loops whose generators join, leave, die and come back: the same is learnt."""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import Harness, make_config

from rlhf_ray.driver.checkpoint import RunState
from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.errors import ActorFailure
from rlhf_ray.generators.pool import GeneratorPool
from rlhf_ray.types import AdapterUpdate, ServedAdapter, Shard, ShardRequest

Hook = Callable[[GeneratorPool, int], None]
"""What happens in a run: called with the pool and the version before each shard is handed on."""


class NotApplying(FakeEngine):
    """Says that it serves, and applies nothing."""

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        served = await super().serve(update)
        self.held = {}
        return served


class DiesAt(FakeEngine):
    """An engine whose process dies when it is sent a version."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self._version = version

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        if update.version == self._version:
            raise ActorFailure(f"died when it was sent version {update.version}")
        return await super().serve(update)


def pool_with(hook: Hook) -> Any:
    """A pool in whose runs something happens."""

    class Pool(GeneratorPool):
        async def generate(
            self, requests: Sequence[ShardRequest], *, or_newer: bool = False
        ) -> AsyncIterator[Shard]:
            async for shard in super().generate(requests, or_newer=or_newer):
                hook(self, requests[0].version)
                yield shard

    return Pool


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    harness = Harness(make_config(tmp_path_factory.mktemp("undisturbed")))
    harness.run()
    return harness


def assert_same(harness: Harness, undisturbed: Harness) -> None:
    """The same was sampled, learnt and evaluated, each once."""
    assert harness.metrics() == undisturbed.metrics()
    assert harness.records("completions") == undisturbed.records("completions")
    assert harness.records("eval") == undisturbed.records("eval")
    learnt = Counter(p for what, ps in harness.events if what == "learn" for p in ps)
    assert learnt == dict.fromkeys(range(8), 6)


def test_growing_and_shrinking_changes_nothing_but_the_time(
    tmp_path: Path, undisturbed: Harness
) -> None:
    targets = {1: 3, 4: 1}

    def scale(pool: GeneratorPool, version: int) -> None:
        if version in targets:
            pool.scale_to(targets[version])

    harness = Harness(make_config(tmp_path), [FakeEngine(delay_s=0.002)], pool=pool_with(scale))
    summary = harness.run()
    assert_same(harness, undisturbed)
    assert summary["samples_requeued"] == summary["generator_restarts"] == 0
    assert [record["generators/target"] for record in harness.records("metrics")] == [
        1, 3, 3, 3, 1, 1,
    ]  # fmt: skip
    ready = [record["generators/ready"] for record in harness.records("metrics")]
    assert ready[3] == 3
    assert ready[-1] == 1
    ended = [name for what, name in harness.events if what == "end"]
    assert len(ended) == 2


def test_a_joining_generator_samples_under_the_version_of_the_iteration_alone(
    tmp_path: Path,
) -> None:
    """The generator joins during an iteration; the proof comes before its first prompt."""
    harness = Harness(
        make_config(tmp_path),
        [FakeEngine(delay_s=0.003)],
        pool=pool_with(lambda pool, version: pool.scale_to(2) if version == 2 else None),
    )
    harness.run()
    start = harness.events.index(("start", "generator-1"))
    after = harness.events[start:]
    publications = [version for what, version in after if what == "publish"]
    assert publications[:3] == [-1, -1, 2]


@pytest.mark.parametrize("call", [4, 6, 11, 15])
def test_a_death_with_shards_in_flight_loses_and_doubles_nothing(
    call: int, tmp_path: Path, undisturbed: Harness
) -> None:
    engines = [FakeEngine(fail_on_call=call, delay_s=0.001), FakeEngine(delay_s=0.001)]
    harness = Harness(make_config(tmp_path, max_restarts=3), engines)
    summary = harness.run()
    assert_same(harness, undisturbed)
    assert summary["generator_restarts"] == 1
    assert summary["samples_requeued"] >= 2
    last = harness.records("metrics")[-1]
    assert last["generators/restarts"] == 1
    assert last["generators/requeued"] == summary["samples_requeued"]


def test_the_only_generator_may_die_and_come_back(tmp_path: Path, undisturbed: Harness) -> None:
    harness = Harness(make_config(tmp_path, max_restarts=1), [FakeEngine(fail_on_call=8)])
    summary = harness.run()
    assert_same(harness, undisturbed)
    assert summary["generator_restarts"] == 1


def test_a_death_during_publication_is_made_up_for(tmp_path: Path, undisturbed: Harness) -> None:
    harness = Harness(make_config(tmp_path, max_restarts=1), [FakeEngine(), DiesAt(version=3)])
    summary = harness.run()
    assert_same(harness, undisturbed)
    assert summary["generator_restarts"] == 1
    assert any("generator-1 is out of use: died when" in line for line in harness.told)


def test_a_joining_generator_that_fails_its_proof_is_not_used(
    tmp_path: Path, undisturbed: Harness
) -> None:
    harness = Harness(
        make_config(tmp_path),
        pool=pool_with(lambda pool, version: pool.scale_to(2) if version == 1 else None),
    )
    made: list[NotApplying] = []

    def new_engine() -> FakeEngine:
        made.append(NotApplying())
        return made[-1]

    harness.processes.engines = new_engine
    summary = harness.run()
    assert_same(harness, undisturbed)
    (engine,) = made
    assert engine.calls["sample"] == 2  # at rest and with the probe
    assert any("generator-1 is out of use: generator-1 does not apply" in t for t in harness.told)
    assert summary["generator_restarts"] == 0


def test_a_run_without_generators_ends_and_goes_on_later(
    tmp_path: Path, undisturbed: Harness
) -> None:
    broken = Harness(make_config(tmp_path, max_restarts=2), [FakeEngine(fail_on_call=11)])
    broken.processes.engines = lambda: FakeEngine(fail_on_call=3)  # passes the proof, then dies
    with pytest.raises(ActorFailure, match="No generator is left, and 2 restarts"):
        broken.run()
    resumed = Harness(make_config(tmp_path, max_restarts=2))
    resumed.run()
    assert resumed.metrics() == undisturbed.metrics()


def test_counts_of_earlier_processes_are_kept(tmp_path: Path) -> None:
    config = make_config(tmp_path, iterations=2, max_restarts=1)
    first = Harness(config, [FakeEngine(fail_on_call=5)])
    assert first.run()["generator_restarts"] == 1
    saved = first.checkpoints.latest()
    assert saved is not None
    requeued = RunState(**saved.progress).samples_requeued
    assert requeued > 0
    config = make_config(tmp_path, iterations=4, max_restarts=1)
    summary = Harness(config, [FakeEngine(fail_on_call=5)]).run()
    assert summary["generator_restarts"] == 2
    assert summary["samples_requeued"] > requeued
