"""A run that is asked to stop ends after its iteration, committed, and goes on as if it had not."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
from fakes import FakePolicy
from harness import Harness, make_config

from rlhf_ray.config import Config, resolve
from rlhf_ray.errors import ConfigError
from rlhf_ray.runs.control import ControlFiles
from rlhf_ray.stages import pipeline
from rlhf_ray.types import Mismatch, Shard, StepReport


class StoppedPolicy(FakePolicy):
    """Asks its loop to stop while it learns its third batch."""

    harness: Harness

    async def learn(
        self, advantage_mean: float, advantage_std: float, iteration: int
    ) -> StepReport:
        report = await super().learn(advantage_mean, advantage_std, iteration)
        if self.learnt == 3:
            self.harness.loop.request_stop()
        return report


def test_a_stop_commits_and_saves_the_iteration_and_the_run_goes_on(tmp_path: Path) -> None:
    whole = Harness(make_config(tmp_path / "whole", save_every=4))
    assert whole.run()["stopped"] is False
    config = make_config(tmp_path / "stopped", save_every=4)
    policy = StoppedPolicy()
    first = policy.harness = Harness(config, policy=policy)
    summary = first.run()
    assert (summary["iterations"], summary["stopped"]) == (3, True)
    assert first.saved() == [3]
    again = Harness(config)
    assert again.run()["iterations"] == 6
    assert again.metrics() == whole.metrics()


def test_a_pipeline_that_is_asked_to_stop_begins_no_further_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {"dir": str(tmp_path / "run"), "stages": ["prepare", "pretrain"]}
    config = resolve(
        {"run": stages, "cluster": {"mode": "inline"}, "rollout": {"engine": "transformers"}}
    )
    files, begun = ControlFiles(tmp_path / "run"), list[str]()

    def run_stage(config: Config, stage: str) -> None:
        begun.append(stage)
        assert files.status().stage == stage
        if len(begun) == 1:
            files.request(stop=True)

    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    pipeline.run(config)
    assert begun == ["prepare"]
    assert files.status().state == "stopped"
    assert "Stopped on request; run or submit" in capsys.readouterr().out
    pipeline.run(config)
    assert begun == ["prepare", "prepare", "pretrain"], "an old wish stops no new process"
    assert files.status().state == "finished"


def test_a_relative_folder_is_refused_inside_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(ConfigError, match=r"run\.dir runs/run is relative.*run\.dir=/mnt/shared"):
        pipeline.run(resolve({"run": {"stages": ["prepare"]}}))
    assert not (tmp_path / "runs").exists()


class InterruptedPolicy(FakePolicy):
    """Interrupts its loop while it learns its third batch, or scores the fourth."""

    harness: Harness
    phase = "learn"

    async def learn(
        self, advantage_mean: float, advantage_std: float, iteration: int
    ) -> StepReport:
        if self.learnt == 2 and self.phase == "learn":
            self.harness.loop.interrupt()
            await asyncio.sleep(0)
        return await super().learn(advantage_mean, advantage_std, iteration)

    async def logprobs(self, shard: Shard) -> tuple[list[np.ndarray], Mismatch]:
        if self.learnt == 3 and self.phase == "score":
            self.harness.loop.interrupt()
            await asyncio.sleep(0)
        return await super().logprobs(shard)


@pytest.mark.parametrize("phase", ["learn", "score"])
def test_an_interruption_keeps_what_is_learnt_and_drops_what_is_sampled(
    tmp_path: Path, phase: str
) -> None:
    whole = Harness(make_config(tmp_path / "whole", save_every=4))
    whole.run()
    config = make_config(tmp_path / "stopped", save_every=4)
    policy = InterruptedPolicy()
    policy.phase = phase
    first = policy.harness = Harness(config, policy=policy)
    with pytest.raises(asyncio.CancelledError):
        first.run()
    assert first.saved() == [3]
    assert [kind for kind, _ in first.events].count("learn") == 3
    again = Harness(config)
    summary = again.run()
    assert summary["iterations"] == 6
    assert again.metrics() == whole.metrics()
    assert again.records("eval") == whole.records("eval")
    # What is dropped is lost; the pause after it is not.
    assert set(summary["seconds_lost"]) <= {"driver: redone"}
    assert summary["restarts"]["driver"] == 1


def test_learning_that_is_late_is_dropped_and_learnt_again(tmp_path: Path) -> None:
    class LatePolicy(InterruptedPolicy):
        async def learn(
            self, advantage_mean: float, advantage_std: float, iteration: int
        ) -> StepReport:
            if self.learnt == 2:
                self.harness.task.cancel()
                await asyncio.sleep(60)
            return await super().learn(advantage_mean, advantage_std, iteration)

    whole = Harness(make_config(tmp_path / "whole", save_every=4))
    whole.run()
    config = make_config(tmp_path / "stopped", save_every=4)
    policy = LatePolicy()
    first = policy.harness = Harness(config, policy=policy)
    with pytest.raises(asyncio.CancelledError):
        first.run()
    assert first.saved() == [2]
    again = Harness(config)
    again.run()
    assert again.metrics() == whole.metrics()
