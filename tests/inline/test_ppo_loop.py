"""THE loop over fake roles: the order of its events, what it refuses, how it goes on."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from harness import Harness, ledger, make_config

from rlhf_ray.algorithms.advantages import Estimator
from rlhf_ray.driver import batches
from rlhf_ray.engines.fake import SHORT, FakeEngine
from rlhf_ray.models.stop_conditions import StopConditions


def test_an_iteration_generates_scores_learns_commits_and_publishes(tmp_path: Path) -> None:
    harness = Harness(make_config(tmp_path, iterations=2))
    harness.run()
    of_iteration = [
        (what, detail)
        for what, detail in _after(harness.events, ("commit", 1))
        if what != "generated"
    ]
    assert of_iteration[0] == ("publish", 1)
    assert sorted(of_iteration[1:7]) == [
        ("generate", (1, 0)),
        ("generate", (1, 1)),
        ("generate", (1, 2)),
        ("score", 0),
        ("score", 1),
        ("score", 2),
    ]
    assert [what for what, _ in of_iteration[7:11]] == ["assemble", "learn", "commit", "publish"]
    assert of_iteration[8:11] == [("learn", list(range(8))), ("commit", 2), ("publish", 2)]


def test_a_shard_is_scored_while_others_still_generate(tmp_path: Path) -> None:
    harness = Harness(make_config(tmp_path, iterations=1), [FakeEngine(), FakeEngine(delay_s=0.2)])
    harness.run()
    # Version 0: the evaluation before the first iteration comes first.
    rollout = _last_rollout(harness.events)
    last_generated = max(i for i, (what, _) in enumerate(rollout) if what == "generated")
    scored_before = [event for event in rollout[:last_generated] if event[0] == "score"]
    assert scored_before, "scoring waited for the slow generator"


def test_the_proof_comes_before_the_first_sample_and_zero_before_the_probe(
    tmp_path: Path,
) -> None:
    harness = Harness(make_config(tmp_path, iterations=1), [FakeEngine(), FakeEngine()])
    harness.run()
    published = [event for event in harness.events if event[0] == "publish"]
    proof = [("publish", -1)] * 4  # zero and probe on each generator
    assert published == [*proof, ("publish", 0), ("publish", 0), ("publish", 1), ("publish", 1)]
    first_rollout = harness.events.index(("generate", (0, 0)))
    assert all(event != ("publish", -1) for event in harness.events[first_rollout:])


def test_counts_and_version_add_up(tmp_path: Path) -> None:
    harness = Harness(make_config(tmp_path))
    summary = harness.run()
    assert summary["iterations"] == summary["adapter_version"] == 6
    assert summary["samples_generated"] == summary["samples_learnt"] == summary["episodes"] == 48
    assert summary["samples_requeued"] == summary["generator_restarts"] == 0
    assert summary["ledger"] == ledger(48)
    assert summary["effective_time_ratio"] == 1.0
    assert set(summary["restarts"].values()) == {0}
    assert [record["policy/version"] for record in harness.metrics()] == [1, 2, 3, 4, 5, 6]
    assert [record["episode"] for record in harness.metrics()] == [8, 16, 24, 32, 40, 48]
    scores = [record["objective/scores"] for record in harness.metrics()]
    assert summary["reward_first"] == pytest.approx(sum(scores[:5]) / 5)
    assert summary["reward_last"] == pytest.approx(sum(scores[1:]) / 5)
    assert set(summary["seconds"]) == {"gen", "score", "learn", "commit", "sync", "save", "total"}


def test_every_iteration_leaves_completions(tmp_path: Path) -> None:
    harness = Harness(make_config(tmp_path, iterations=2))
    harness.run()
    records = harness.records("completions")
    assert [record["iteration"] for record in records] == [1] * 8 + [2] * 8
    assert [record["version"] for record in records] == [0] * 8 + [1] * 8
    assert records[0]["length"] == len(records[0]["response"].split())
    assert all(record["prompt"].startswith("prompt ") for record in records)


def test_commits_are_written_every_so_often_and_at_the_end(tmp_path: Path) -> None:
    config = make_config(tmp_path, iterations=5, keep_checkpoints=9, eval_every=100)
    harness = Harness(config)
    harness.run()
    assert harness.saved() == [2, 4, 5]
    checkpoints = harness.folder / "checkpoints"
    assert (checkpoints / "latest").resolve().name == "5"
    assert not (checkpoints / "best").exists()


def test_the_best_version_is_kept(tmp_path: Path) -> None:
    config = make_config(tmp_path, keep_checkpoints=1, eval_every=1, save_every=6, iterations=6)
    harness = Harness(config)
    summary = harness.run()
    evaluations = harness.records("eval")
    assert [record["iteration"] for record in evaluations] == [0, 1, 2, 3, 4, 5, 6]
    assert [record["version"] for record in evaluations] == [0, 1, 2, 3, 4, 5, 6]
    scores = [record["eval/score"] for record in evaluations]
    assert summary["best_eval_score"] == max(scores)
    # The first version with the highest score; one that merely ties is not better.
    best = scores.index(max(scores))
    assert best not in (0, 6)
    checkpoints = harness.folder / "checkpoints"
    assert (checkpoints / "best").resolve().name == str(best)
    assert harness.saved() == [best, 6]
    assert len(evaluations[0]["samples"]) == 2  # as many as there are held-out prompts


def test_an_evaluation_changes_nothing_in_the_run(tmp_path: Path) -> None:
    often = Harness(make_config(tmp_path / "often", eval_every=1))
    never = Harness(make_config(tmp_path / "never", eval_every=100))
    often.run()
    never.run()
    assert often.metrics() == never.metrics()


def test_the_seed_decides_the_metrics(tmp_path: Path) -> None:
    one, other = Harness(make_config(tmp_path / "a")), Harness(make_config(tmp_path / "b"))
    config = make_config(tmp_path / "c")
    seeded = Harness(config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})}))
    for harness in (one, other, seeded):
        harness.run()
    assert one.metrics() == other.metrics()
    assert one.metrics() != seeded.metrics()


@pytest.mark.parametrize(
    "stop_conditions", [SHORT, StopConditions(8, strings=("7",), limits=(2, 8))]
)
def test_number_and_order_of_generators_change_nothing(
    tmp_path: Path, stop_conditions: StopConditions
) -> None:
    one = Harness(make_config(tmp_path / "one"), [FakeEngine(stop_conditions=stop_conditions)])
    one.run()
    delays = (0.02, 0.0, 0.01)
    engines = [FakeEngine(stop_conditions=stop_conditions, delay_s=delay) for delay in delays]
    three = Harness(make_config(tmp_path / "three"), engines)
    three.run()
    assert [engine.calls["sample"] for engine in one.engines] != [0]
    assert all(engine.calls["sample"] > 2 for engine in three.engines)
    done = [detail for what, detail in three.events if what == "generated"]
    assert any(a > b for a, b in pairwise(done) if a[0] == b[0]), "the order must have differed"
    assert three.metrics() == one.metrics()
    assert three.records("completions") == one.records("completions")


def test_what_does_not_end_is_learnt_with_a_penalty_and_logged_without(tmp_path: Path) -> None:
    plain, penalised = (
        Harness(make_config(tmp_path / str(p), missing_eos_penalty=p, iterations=1))
        for p in (0.0, 0.5)
    )
    for harness in (plain, penalised):
        harness.run()
    (before,), (after,) = plain.metrics(), penalised.metrics()
    assert 0 < before["response_length/eos_share"] < 1
    paid = 0.5 * (1 - before["response_length/eos_share"])
    assert after["objective/scores"] == before["objective/scores"]
    assert after["objective/rlhf_reward"] == pytest.approx(before["objective/rlhf_reward"] - paid)
    assert after["objective/non_score_reward"] == pytest.approx(
        before["objective/non_score_reward"]
    )
    raw = [[r["score"] for r in h.records("completions")] for h in (plain, penalised)]
    assert raw[0] == raw[1]


def test_the_kl_coefficient_follows_the_controller(tmp_path: Path) -> None:
    harness = Harness(make_config(tmp_path))
    harness.run()
    records = harness.metrics()
    coefficients = [record["objective/kl_coef"] for record in records]
    assert coefficients[0] == 0.2
    for before, after in pairwise(records):
        # Target .5 nats, horizon 80 samples, 8 samples an iteration (recipe: Ziegler et al. 2019).
        error = min(max(before["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        expected = before["objective/kl_coef"] * (1 + error * 8 / 80)
        assert after["objective/kl_coef"] == pytest.approx(expected, rel=1e-12)
    assert len(set(coefficients)) == 6
    assembled = [detail for what, detail in harness.events if what == "assemble"]
    assert assembled == coefficients


def test_a_fixed_kl_coefficient_stays(tmp_path: Path) -> None:
    harness = Harness(make_config(tmp_path, kl_target=None, iterations=3))
    harness.run()
    assert [record["objective/kl_coef"] for record in harness.metrics()] == [0.2] * 3


def _after(events: list[Any], event: Any) -> list[Any]:
    return events[events.index(event) + 1 :]


def _last_rollout(events: list[Any]) -> list[Any]:
    """Events from the first shard of the last batch to the beginning of learning."""
    end = max(i for i, (what, _) in enumerate(events) if what == "assemble")
    start = max(i for i, event in enumerate(events[:end]) if event[0] == "publish")
    return events[start + 1 : end]


def test_samples_cost_the_time_of_all_gpus_that_the_actors_hold(tmp_path: Path) -> None:
    config = make_config(tmp_path, iterations=1)
    cluster = config.cluster.model_copy(update={"gpu_hour_price": 2.5})
    run = Harness(config.model_copy(update={"cluster": cluster}))
    run.run()
    (record,) = run.records("metrics")
    # Four GPUs at 2.5 an hour, for eight samples.
    cost = 1000 * 4 * 2.5 * record["timing_s/iteration"] / 3600 / 8
    assert record["cost/per_1000_samples"] == pytest.approx(cost)
    assert record["rollout/staleness"] == 0


def test_the_estimator_is_loaded_once_not_in_each_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a file of the user's, which loading runs."""
    loaded: list[str] = []
    resolve = batches.resolve

    def counted(name: str) -> Estimator:
        loaded.append(name)
        return resolve(name)

    monkeypatch.setattr(batches, "resolve", counted)
    Harness(make_config(tmp_path)).run()
    assert loaded == ["gae"]
