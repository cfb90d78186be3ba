"""Whole PPO loops with generators that sample from another adapter than they report to serve."""

from collections.abc import Callable, Collection
from pathlib import Path

import pytest
from fakes import FakePolicy
from harness import Harness, make_config
from test_elastic_generators import assert_same

from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import AdapterUpdate, ServedAdapter

ALWAYS = range(100)


class Wrong(FakeEngine):
    """Passes the proof, and samples some versions from half of their adapter."""

    def __init__(self, versions: Collection[int]) -> None:
        super().__init__(delay_s=0.002)
        self._versions = versions

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        served = await super().serve(update)
        if update.version in self._versions:
            assert self.held is not None
            self.held = {
                name: tensor / 2 if "lora_B" in name else tensor
                for name, tensor in self.held.items()
            }
        return served


def honest() -> FakeEngine:
    return FakeEngine(delay_s=0.002)


def moved() -> FakePolicy:
    """A policy whose first adapter is not zero, so that a half of it is another one."""
    policy = FakePolicy()
    policy.b_V[::2] = 0.5
    return policy


def run_of(
    folder: Path, *engines: FakeEngine, later: Callable[[], FakeEngine] = honest, restarts: int = 5
) -> Harness:
    harness = Harness(make_config(folder, max_restarts=restarts), engines, policy=moved())
    harness.processes.engines = later
    return harness


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    harness = run_of(tmp_path_factory.mktemp("undisturbed"), honest())
    harness.run()
    return harness


@pytest.mark.parametrize("version", [0, 3])
def test_a_generator_that_is_wrong_for_a_batch_is_replaced_and_the_same_is_learnt(
    tmp_path: Path, undisturbed: Harness, version: int
) -> None:
    """Also in the first batch, which sets the bound."""
    harness = run_of(tmp_path, honest(), Wrong({version}))
    summary = harness.run()
    assert_same(harness, undisturbed)
    assert summary["generator_restarts"] == summary["guards"]["mismatch"] == 1
    saved = harness.checkpoints.latest()
    assert saved is not None
    assert saved.progress["gap_bound"] == 1e-4
    (warning,) = [r for r in harness.records("warnings") if r["guard"] == "mismatch"]
    assert (warning["iteration"], warning["action"]) == (version + 1, "replace")
    assert "generator-1: proved again and replaced" in warning["text"]
    (line,) = [line for line in harness.told if "out of use" in line]
    assert line.startswith("generator-1 is out of use: Shard")
    assert line.endswith("The proof, made again, passed")
    (outage,) = [r for r in harness.records("outages") if r["cause"] == "mismatch"]
    assert outage["role"] == "generator"
    assert outage["seconds"] > 0
    # Proved twice more: once to know, once because a new process must.
    publications = [v for what, v in harness.events if what == "publish"]
    assert publications.count(-1) == 2 * (2 + 2)


def test_a_generator_that_is_always_wrong_is_given_up_for_the_others(
    tmp_path: Path, undisturbed: Harness
) -> None:
    harness = run_of(tmp_path, honest(), Wrong(ALWAYS), later=lambda: Wrong(ALWAYS), restarts=2)
    summary = harness.run()
    assert_same(harness, undisturbed)
    assert summary["guards"]["mismatch"] == 3
    assert summary["generator_restarts"] == 2
    assert harness.records("metrics")[-1]["generators/ready"] == 1


def test_the_only_generator_may_be_wrong_for_a_batch(tmp_path: Path, undisturbed: Harness) -> None:
    harness = run_of(tmp_path, Wrong({2}), restarts=1)
    assert harness.run()["guards"]["mismatch"] == 1
    assert_same(harness, undisturbed)


@pytest.mark.parametrize("restarts", [0, 5])
def test_the_only_generator_that_stays_wrong_ends_the_run(tmp_path: Path, restarts: int) -> None:
    harness = run_of(tmp_path, Wrong(ALWAYS), later=lambda: Wrong(ALWAYS), restarts=restarts)
    with pytest.raises(WeightSyncError, match=r"Shard 0 \(version 0\): engine and learner differ"):
        harness.run()
    ends = [name for what, name in harness.events if what == "end"]
    assert ends == ["generator-0"] * bool(restarts)
    assert ("learn", list(range(8))) not in harness.events


def test_where_all_generators_are_wrong_the_run_ends_at_once(tmp_path: Path) -> None:
    harness = run_of(tmp_path, Wrong({1}), Wrong({1}))
    with pytest.raises(WeightSyncError, match=r"Shard 0 \(version 1\): engine and learner differ"):
        harness.run()
    assert not [name for what, name in harness.events if what == "end"]
    assert not [r for r in harness.records("warnings") if r["guard"] == "mismatch"]


def test_a_fault_that_comes_back_with_the_same_positions_ends_the_run(tmp_path: Path) -> None:
    """The learner's: whoever samples, its log-probs are others."""
    policy = FakePolicy(fault_at=3, gap=0.02)
    config = make_config(tmp_path, max_restarts=5)
    harness = Harness(config, [FakeEngine()], policy=policy)
    with pytest.raises(WeightSyncError, match=r"Shard 0 \(version 2\): .* differ by 0.02 nats"):
        harness.run()
    assert harness.saved() == [2]
