"""The metrics of every kind of stage reach the trackers, once each, whatever happens on the way."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import copy_of
from fakes import FakePolicy
from harness import Harness, make_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_ray.config import load
from rlhf_ray.observability import trackers
from rlhf_ray.observability.tracker_libraries import TrackedRun
from rlhf_ray.observability.trackers import tracking
from rlhf_ray.stages import pipeline


class Told(TrackedRun):
    """A tracker that remembers, over several processes."""

    run_id, where, is_local = "one", "here", True

    def __init__(self) -> None:
        self.metrics: list[tuple[str, int, Mapping[str, float]]] = []
        self.tables: list[tuple[str, int, int]] = []
        self.ends: list[bool] = []

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.append((axis, step, metrics))

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self.tables.append((name, step, len(rows)))

    def close(self, failed: bool) -> None:
        self.ends.append(failed)

    def steps(self, metric: str) -> list[int]:
        """Steps at which a metric was told."""
        return [step for _, step, metrics in self.metrics if metric in metrics]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    tracker = Told()
    # The name is that of a package that is there.
    monkeypatch.setattr(trackers, "configured", lambda _: {"json": lambda *_: tracker})
    return tracker


class Interrupted(Exception):
    """A loop that ends in the middle of a run."""


class StopsIn(FakePolicy):
    """A policy that dies as it learns in the given iteration."""

    def __init__(self, iteration: int) -> None:
        super().__init__()
        self._left = iteration

    async def learn(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise Interrupted
        return await super().learn(*arguments)


def test_ppo_tells_each_iteration_and_evaluation_once_though_some_are_done_twice(
    told: Told, tmp_path: Path
) -> None:
    config = make_config(tmp_path)
    with pytest.raises(Interrupted), tracking(config, tmp_path):
        Harness(config, policy=StopsIn(4)).run()  # 3 is done, 2 is saved
    with tracking(config, tmp_path):
        harness = Harness(config)
        harness.run()
    assert told.steps("objective/kl") == [1, 2, 3, 4, 5, 6]
    assert told.steps("eval/score") == [0, 3, 6]
    assert {axis for axis, _, _ in told.metrics} == {"iteration"}
    assert told.ends == [True, False]
    assert [record["iteration"] for record in harness.records("metrics")] == [1, 2, 3, 4, 5, 6]


def test_completions_are_told_every_few_iterations(told: Told, tmp_path: Path) -> None:
    values = make_config(tmp_path).model_dump()
    values["trackers"]["completions_every"] = 3
    config = type(make_config(tmp_path)).model_validate(values)
    with tracking(config, tmp_path):
        Harness(config).run()
    assert told.tables == [("completions", 3, 4), ("completions", 6, 4)]


def test_supervised_stages_tell_trackers_and_tensorboard(
    told: Told, tmp_path: Path, config_file: Path
) -> None:
    folder = tmp_path / "run"
    config = load(config_file, [f"run.dir={folder}", "run.stages=[prepare, pretrain]"])
    pipeline.run(config)
    lines = (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert len(steps) > 10
    assert told.steps("pretrain/loss") == steps
    assert {axis for axis, _, _ in told.metrics} == {"pretrain/step"}
    events = EventAccumulator(str(folder / "pretrain" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == steps
    pipeline.run_single(config, "pretrain")
    assert told.steps("pretrain/loss") == steps * 2


def test_tensorboard_can_be_turned_off(tmp_path: Path, config_file: Path) -> None:
    folder = tmp_path / "run"
    stages = "run.stages=[prepare, pretrain]"
    pipeline.run(load(config_file, [f"run.dir={folder}", stages, "trackers.tensorboard=false"]))
    assert not list(folder.rglob("tensorboard"))


def test_an_evaluation_is_told_at_the_version_of_its_policy_and_anew_when_it_is_done_anew(
    told: Told, tmp_path: Path, whole_run: Path
) -> None:
    config = load(copy_of(whole_run, tmp_path) / "config.yaml", [f"run.dir={tmp_path}/run"])
    pipeline.run_single(config, "evaluate")
    assert told.steps("evaluate/win_rate/ppo") == [1, 1]  # the finished stage's, then the new one's
    assert told.steps("evaluate/perplexity/sft") == [1, 1]
    assert {axis for axis, _, m in told.metrics if "evaluate/elo/ppo" in m} == {"evaluate/step"}
    summary = json.loads((tmp_path / "run" / "evaluate" / "summary.json").read_text())
    rates = [m["evaluate/win_rate/ppo"] for _, _, m in told.metrics if "evaluate/elo/ppo" in m]
    assert rates == [summary["win_rate"]["value"]] * 2
