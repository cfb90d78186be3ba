"""The guards in the loop over fakes: what is warned of, stopped, rolled back, and recorded."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakePolicy, FakeScorer
from harness import Harness, ledger, make_config

from rlhf_ray.engines.fake import VOCAB_SIZE
from rlhf_ray.errors import DivergenceError
from rlhf_ray.types import RawScores, Shard, StepReport

SPIKE = 7
"""Iteration whose scores jump."""


@dataclass
class _Jumps(FakeScorer):
    """A hundredfold score for what version 6 sampled, the seventh iteration's."""

    async def score(self, shard: Shard) -> RawScores:
        scores = await super().score(shard)
        factor = 100.0 if shard.info.versions[0] == SPIKE - 1 else 1.0
        return {name: tuple(factor * score for score in row) for name, row in scores.items()}  # type: ignore[operator]


@dataclass
class _StaysUp(FakeScorer):
    """A hundredfold score from version 6 on, whatever is sampled."""

    async def score(self, shard: Shard) -> RawScores:
        scores = await super().score(shard)
        factor = 100.0 if shard.info.versions[0] >= SPIKE - 1 else 1.0
        return {name: tuple(factor * score for score in row) for name, row in scores.items()}  # type: ignore[operator]


def spiking(
    folder: Path,
    action: str,
    iterations: int = 10,
    scorer: type[FakeScorer] = _Jumps,
    policy: FakePolicy | None = None,
) -> Harness:
    """A run that saves every version and evaluates none but the first."""
    config = make_config(
        folder,
        guards={"loss_spike": {"action": action, "max_in_a_row": 2}},
        iterations=iterations,
        save_every=1,
        keep_checkpoints=20,
        eval_every=1000,
    )
    return Harness(config, scorer=scorer, policy=policy)


def learner(harness: Harness, version: int, group: str) -> bytes:
    name = {"policy": "learner", "critic": "value"}[group]
    return (harness.folder / "checkpoints" / str(version) / group / name).read_bytes()


def warnings(harness: Harness, guard: str) -> list[dict[str, Any]]:
    return [record for record in harness.records("warnings") if record["guard"] == guard]


def test_a_spike_is_rolled_back_and_its_batch_set_aside(tmp_path: Path) -> None:
    harness, clean = spiking(tmp_path / "run", "rollback"), spiking(tmp_path / "clean", "off")
    clean._scorer = FakeScorer
    summary = harness.run()
    clean.run()
    for group in ("policy", "critic"):
        assert learner(harness, SPIKE, group) == learner(harness, SPIKE - 1, group)
        assert learner(harness, SPIKE + 1, group) != learner(harness, SPIKE, group)
    published = [version for what, version in harness.events if what == "publish" and version >= 0]
    assert published == list(range(11)), "the old weights go out under a new version"
    assert summary["samples_generated"] == 80
    assert summary["samples_learnt"] == summary["episodes"] == 72
    assert summary["samples_set_aside"] == 8
    assert summary["ledger"] == ledger(72, discarded=8)
    assert summary["seconds_lost"]["driver: rolled back"] > 0
    assert summary["guards"]["loss_spike"] == 1
    aside = [record["episode_set_aside"] for record in harness.metrics()]
    assert aside == [0] * (SPIKE - 1) + [8] * 4
    # Its prompts count as drawn: later iterations are of the prompts that they would have been of.
    prompts = [
        [record["prompt"] for record in run.records("completions")] for run in (harness, clean)
    ]
    assert prompts[0] == prompts[1]
    # The controller does not learn from what is set aside.
    coefs = [record["objective/kl_coef"] for record in harness.metrics()]
    assert coefs[SPIKE] == coefs[SPIKE - 1] != coefs[SPIKE - 2]


def test_a_warning_names_the_numbers_and_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harness = spiking(tmp_path, "warn")
    summary = harness.run()
    record, *later = warnings(harness, "loss_spike")
    # Committed, the spike stays in the critic, whose loss comes down by and by.
    assert [after["iteration"] for after in later] == [8, 9, 10]
    assert summary["guards"]["loss_spike"] == 4
    assert (record["iteration"], record["action"]) == (SPIKE, "warn")
    assert set(record["numbers"]) >= {"loss/value_avg"}
    assert record["numbers"]["loss/value_avg"] == harness.metrics()[6]["loss/value_avg"]
    assert "times its median over the last 6 iterations" in record["text"]
    assert summary["samples_learnt"] == 80
    assert (
        f"Warning: ppo, iteration {SPIKE}, loss_spike: loss/value_avg of" in capsys.readouterr().out
    )


@pytest.mark.parametrize("stopped_after", [6, 7, 8])
def test_history_and_rollbacks_outlive_a_restart(tmp_path: Path, stopped_after: int) -> None:
    whole = spiking(tmp_path / "whole", "rollback")
    expected = whole.run()
    spiking(tmp_path / "run", "rollback", iterations=stopped_after).run()
    resumed = spiking(tmp_path / "run", "rollback")
    summary = resumed.run()
    assert resumed.metrics() == whole.metrics()
    assert warnings(resumed, "loss_spike") == warnings(whole, "loss_spike")
    assert summary["guards"]["loss_spike"] == expected["guards"]["loss_spike"] == 1


def test_a_spike_that_comes_back_with_every_batch_ends_the_run(tmp_path: Path) -> None:
    harness = spiking(tmp_path, "rollback", scorer=_StaysUp)
    with pytest.raises(DivergenceError, match=r"Iteration 9: .*after 2 that were rolled back"):
        harness.run()
    assert harness.saved()[-1] == 8
    assert learner(harness, 8, "policy") == learner(harness, SPIKE - 1, "policy")


@dataclass
class _BrokenOnce(FakePolicy):
    """Reports a broken loss the first time that it learns the iteration ``fault_at``."""

    async def learn(
        self, advantage_mean: float, advantage_std: float, iteration: int
    ) -> StepReport:
        is_next = self.learnt + 1 == self.fault_at
        report = await super().learn(advantage_mean, advantage_std, iteration)
        if is_next:
            self.fault_at = 0
        return report


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("loss", [math.nan, -math.inf])
def test_a_broken_iteration_is_rolled_back_unless_told_otherwise(
    tmp_path: Path, first: int, loss: float
) -> None:
    """Also the first one: the commit that it returns to is held from the start."""
    policy = _BrokenOnce(fault_at=first, loss=loss)
    config = make_config(tmp_path, save_every=1, keep_checkpoints=20, eval_every=1000)
    harness = Harness(config, policy=policy)
    summary = harness.run()
    assert policy.learnt == summary["iterations"] - 1 == 5
    assert (summary["samples_learnt"], summary["samples_set_aside"]) == (40, 8)
    (record,) = warnings(harness, "non_finite")
    assert (record["iteration"], record["action"]) == (first, "rollback")
    assert summary["guards"]["non_finite"] == 1
    assert summary["guards"]["loss_spike"] == 0
    published = [version for what, version in harness.events if what == "publish" and version >= 0]
    assert published == list(range(7))
    if first > 1:
        assert learner(harness, first, "policy") == learner(harness, first - 1, "policy")
    assert all(np.isfinite(policy.b_V))


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("spike", ["off", "warn", "rollback"])
def test_what_stays_broken_ends_the_run(tmp_path: Path, first: int, spike: str) -> None:
    policy = FakePolicy(fault_at=first, loss=math.nan)
    harness = spiking(tmp_path, spike, scorer=FakeScorer, policy=policy)
    with pytest.raises(
        DivergenceError, match=r"loss/policy_avg is not finite.*after 2 that were rolled back"
    ):
        harness.run()
    assert policy.learnt == first, "learnt, and gone back from, twice before"
    assert [record["iteration"] for record in warnings(harness, "non_finite")] == [
        first,
        first + 1,
        first + 2,
    ]


def test_a_stop_comes_before_the_commit(tmp_path: Path) -> None:
    harness = spiking(tmp_path, "stop")
    with pytest.raises(DivergenceError, match=r"Iteration 7: .*guards\.loss_spike\.action=warn"):
        harness.run()
    assert harness.saved()[-1] == SPIKE - 1
    assert ("publish", SPIKE) not in harness.events
    assert [record["iteration"] for record in warnings(harness, "loss_spike")] == [SPIKE]
    # It goes on with another action, and the warning of then is that of this time.
    resumed = spiking(tmp_path, "rollback")
    assert resumed.run()["iterations"] == 10
    assert [record["action"] for record in warnings(resumed, "loss_spike")] == ["rollback"]


def collapsed() -> FakePolicy:
    """A policy that says one token almost all the time."""
    b_V = np.zeros(VOCAB_SIZE)
    b_V[2] = 6.0
    return FakePolicy(b_V=b_V)


def test_repetition_is_seen_from_the_responses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guards = {"remind_every": 2}
    harness = Harness(make_config(tmp_path / "bad", guards, iterations=3), policy=collapsed())
    summary = harness.run()
    assert summary["guards"]["repetition"] == len(warnings(harness, "repetition")) == 3
    for record in harness.metrics():
        assert record["response/repeating_share"] > 0.5
        assert record["response/distinct_bigrams"] < 0.5
    told = capsys.readouterr().out
    assert told.count("of the responses repeat a token 4 times or more") == 2  # in 1 and 3
    healthy = Harness(make_config(tmp_path / "good", guards, iterations=3))
    assert healthy.run()["guards"]["repetition"] == 0
    assert all(record["response/repeating_share"] < 0.2 for record in healthy.metrics())


def test_repetition_may_stop_the_run(tmp_path: Path) -> None:
    guards = {"repetition": {"action": "stop"}}
    harness = Harness(make_config(tmp_path, guards), policy=collapsed())
    with pytest.raises(DivergenceError, match=r"Iteration 1: \d+% of the responses"):
        harness.run()
    assert harness.saved() == []


@pytest.mark.parametrize(("iterations", "warns"), [(2, 0), (3, 1)])
def test_prompts_that_come_again_are_told_once(tmp_path: Path, iterations: int, warns: int) -> None:
    """Eight prompts, four an iteration."""
    harness = Harness(make_config(tmp_path, iterations=iterations))
    assert harness.run()["guards"]["prompt_reuse"] == warns
    assert len(warnings(harness, "prompt_reuse")) == warns
    longer = Harness(make_config(tmp_path, iterations=4))
    assert longer.run()["guards"]["prompt_reuse"] == 1
    (record,) = warnings(longer, "prompt_reuse")
    assert record["iteration"] == 0


def kept(harness: Harness) -> list[int]:
    return sorted(int(path.parent.name) for path in harness.folder.glob("ppo/batches/*/batch.json"))


@pytest.mark.parametrize(
    ("choice", "expected"),
    [("none", []), ("warned", [2]), ("last", [2, 6]), ("all", [1, 2, 3, 4, 5, 6])],
)
def test_batches_are_kept_as_the_config_asks(
    tmp_path: Path, choice: str, expected: list[int]
) -> None:
    config = make_config(tmp_path, save_every=1, eval_every=1000)
    run = config.run.model_copy(update={"keep_batches": choice})
    policy = _BrokenOnce(fault_at=2, loss=math.nan)
    harness = Harness(config.model_copy(update={"run": run}), policy=policy)
    harness.run()
    assert kept(harness) == expected
    (warning,) = warnings(harness, "non_finite")
    assert warning.get("batch") == (None if choice == "none" else "batches/2")
    for iteration in expected:
        folder = harness.folder / "ppo" / "batches" / str(iteration)
        values = json.loads((folder / "batch.json").read_text())
        assert values["version"] == values["progress"]["version"] == iteration - 1
        assert values["warned"] == (iteration == 2)
        assert len((folder / "samples.jsonl").read_text().splitlines()) == 8
        # The state before the step, which a rollback made that of two iterations.
        state = (folder / "policy" / "learnt").read_text()
        assert state == str(iteration - 1 if iteration <= 2 else iteration - 2)


def test_the_batch_is_kept_of_an_iteration_that_ends_the_run(tmp_path: Path) -> None:
    harness = spiking(tmp_path, "stop")
    with pytest.raises(DivergenceError):
        harness.run()
    assert kept(harness) == [SPIKE]
    # Resumed, it is run again: the records of it are those of this time.
    resumed = spiking(tmp_path, "rollback", iterations=8)
    resumed.run()
    assert kept(resumed) == [SPIKE, 8]


def test_the_newest_warned_batches_are_kept(tmp_path: Path) -> None:
    harness = spiking(tmp_path, "off", iterations=9, scorer=FakeScorer, policy=collapsed())
    harness.run()
    assert len(warnings(harness, "repetition")) == 9
    assert kept(harness) == [5, 6, 7, 8, 9]


def test_a_batch_that_cannot_be_kept_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    harness = Harness(make_config(tmp_path, iterations=2))
    assert harness.run()["iterations"] == 2
    assert kept(harness) == []
    assert [path.name for path in (tmp_path / "ppo" / "batches").iterdir()] == []
    assert "No space left" in str(warnings(harness, "keep_batches")[0]["text"])
