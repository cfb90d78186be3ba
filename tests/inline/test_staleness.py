"""THE loop with batches generated ahead: no sample too old, none lost, none learnt twice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import FakePolicy
from harness import Harness, ledger, make_config, stop_at_third
from test_wrong_generators import Wrong, honest, moved

from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.errors import WeightSyncError

EXACT = ledger(48)


def ahead(
    folder: Path,
    max_staleness: int = 1,
    engines: Sequence[FakeEngine] = (),
    policy: FakePolicy | None = None,
    restarts: int = 5,
    guards: dict[str, Any] | None = None,
    **ppo: Any,
) -> Harness:
    """A run of two generators, of which one takes longer."""
    keys: dict[str, Any] = {"max_staleness": max_staleness, "importance_cap": 2.0, **ppo}
    config = make_config(folder, guards, restarts, **keys)
    return Harness(config, engines or [FakeEngine(), FakeEngine(delay_s=0.01)], policy)


def ages(harness: Harness) -> list[float]:
    return [record["rollout/staleness"] for record in harness.metrics()]


@pytest.mark.parametrize("max_staleness", [1, 2, 8])
def test_no_sample_is_older_than_allowed_and_each_is_learnt_once(
    tmp_path: Path, max_staleness: int
) -> None:
    harness = ahead(tmp_path, max_staleness)
    assert harness.run()["ledger"] == EXACT
    assert ages(harness)[0] == 0
    assert max(ages(harness)) == min(max_staleness, 5)
    assert [record["policy/version"] for record in harness.metrics()] == [1, 2, 3, 4, 5, 6]


def test_the_next_batch_begins_before_the_present_one_is_learnt(tmp_path: Path) -> None:
    harness = ahead(tmp_path, 1, iterations=2, eval_every=100)
    harness.run()
    first_learnt = harness.events.index(("learn", [*range(8)]))
    requested = [detail for what, detail in harness.events[:first_learnt] if what == "generate"]
    assert requested.count((0, 0)) == 3  # of the evaluation, and of both batches


def test_generators_change_between_their_shards_alone(tmp_path: Path) -> None:
    """Each shard's log-probs are those of the version that it names."""
    engines = [FakeEngine(delay_s=0.003), FakeEngine(delay_s=0.005)]
    harness = ahead(tmp_path, 2, engines, policy=moved(), iterations=12)
    harness.run()  # a shard of two versions would be beyond the mismatch bound
    assert set(ages(harness)) >= {1.0, 2.0}
    spans: dict[tuple[int, int], int] = {}
    for what, detail in harness.events:
        if what in ("generate", "generated"):
            spans[detail] = spans.get(detail, 0) + (1 if what == "generate" else -1)
    assert set(spans.values()) == {0}


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 0), (0, 2)])
def test_a_run_that_was_stopped_draws_again_what_was_in_flight(
    tmp_path: Path, before: int, after: int
) -> None:
    """Also where it goes on with another staleness."""
    first = ahead(tmp_path, before, iterations=6, save_every=1)
    stop_at_third(first)
    summary = first.run()
    assert summary["iterations"] == 3
    assert summary["ledger"] == ledger(24, in_flight=8 * before)
    second = ahead(tmp_path, after, iterations=6)
    assert second.run()["ledger"] == EXACT
    assert [record["iteration"] for record in second.metrics()] == [1, 2, 3, 4, 5, 6]
    assert max(ages(second)[3:]) <= after


def test_an_evaluation_is_of_one_version(tmp_path: Path) -> None:
    harness = ahead(tmp_path, 2, eval_every=1)
    harness.run()
    evaluations = harness.records("eval")
    assert [record["version"] for record in evaluations] == [0, 1, 2, 3, 4, 5, 6]
    alone = Harness(make_config(tmp_path / "alone", eval_every=1))
    alone.run()
    assert evaluations[0]["samples"] == alone.records("eval")[0]["samples"]


def test_a_rolled_back_batch_leaves_those_in_flight(tmp_path: Path) -> None:
    policy = FakePolicy(fault_at=4, loss=float("nan"))
    learn, faulty = policy.learn, policy._faulty
    policy._faulty = lambda: faulty() and not learnt  # type: ignore[method-assign]
    learnt: list[int] = []

    async def once(*args: float) -> Any:
        report = await learn(*args)
        if policy.learnt == 4:
            learnt.append(4)
        return report

    policy.learn = once  # type: ignore[method-assign]
    harness = ahead(tmp_path, 1, policy=policy)
    assert harness.run()["ledger"] == ledger(40, discarded=8)
    assert max(ages(harness)) == 1


@pytest.mark.parametrize("first", [0, 2])
def test_a_generator_that_is_wrong_is_seen_under_the_versions_of_its_samples(
    tmp_path: Path, first: int
) -> None:
    """Its older samples are compared with the adapter that they name, not with the newest one."""
    engines = [honest(), Wrong(range(first, 99))]
    harness = ahead(tmp_path, 1, engines, policy=moved())
    harness.processes.engines = honest
    summary = harness.run()
    assert summary["ledger"] == EXACT
    assert summary["guards"]["mismatch"] in (1, 2)  # it may have sampled for two batches
    warnings = [r for r in harness.records("warnings") if r["guard"] == "mismatch"]
    assert all("generator-1: proved again and replaced" in r["text"] for r in warnings)


def test_where_all_generators_are_wrong_the_run_ends(tmp_path: Path) -> None:
    harness = ahead(tmp_path, 1, [Wrong(range(1, 99)), Wrong(range(1, 99))], policy=moved())
    with pytest.raises(WeightSyncError, match="engine and learner differ"):
        harness.run()


def test_a_dead_generator_costs_no_sample(tmp_path: Path) -> None:
    engines = [FakeEngine(delay_s=0.002), FakeEngine(delay_s=0.002, fail_on_call=6)]
    harness = ahead(tmp_path, 2, engines)
    summary = harness.run()
    assert summary["ledger"] == EXACT
    assert summary["generator_restarts"] == 1
    assert max(ages(harness)) == 2


def test_a_publication_that_no_generator_takes_ends_the_run(tmp_path: Path) -> None:
    class Deaf(FakeEngine):
        async def serve(self, update: Any) -> Any:
            if update.version == 3:
                raise WeightSyncError("it does not hear")
            return await super().serve(update)

    harness = ahead(tmp_path, 1, [Deaf(), Deaf()])
    with pytest.raises(WeightSyncError, match="it does not hear"):
        harness.run()


def test_the_mismatch_that_is_recorded_is_to_the_version_that_sampled(tmp_path: Path) -> None:
    harness = ahead(tmp_path, 2, policy=moved())
    harness.run()
    assert max(ages(harness)) == 2
    assert all(record["sampler/gap_max"] < 1e-5 for record in harness.metrics())
