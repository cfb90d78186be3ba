"""Runs of a supervised stage: resume, refusals, failures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray import disk, interruption
from rlhf_ray.config import Config
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import ConfigError, DivergenceError
from rlhf_ray.models import loading
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages import pipeline
from rlhf_ray.stages.supervised import launcher as supervised
from rlhf_ray.stages.supervised import pretrain, sft, trainer
from rlhf_ray.stages.supervised import reward as reward_model
from rlhf_ray.stages.supervised.arguments import arguments

MakeRun = Callable[..., Config]


class Killed(BaseException):
    """An end as abrupt as a signal: none of our code catches it."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training die at the end of a step, after what the Trainer saves at it."""

    class _Killer(trainer.StepLog):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                raise Killed

    monkeypatch.setattr(trainer, "StepLog", _Killer)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a signal come during a step."""

    class _Interrupter(trainer.StepLog):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                interruption._state.deferring[-1](False)

    monkeypatch.setattr(trainer, "StepLog", _Interrupter)


def weights(config: Config, stage: str) -> dict[str, torch.Tensor]:
    folder = Path(config.run.dir) / stage / ("adapter" if stage == "sft" else "model")
    if stage == "reward":
        model = loading.load_sequence_classifier(str(folder), config.model)
    else:
        model = loading.load_causal_lm(str(folder), config.model)
    return model.state_dict()


def refuse(*_: object) -> None:
    raise AssertionError("tokenised again")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_a_killed_stage_resumes_and_ends_as_if_never_killed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Killed after step 4, saved at step 3: the same weights and curve; nothing is tokenised."""
    run = {"pretrain": pretrain.run, "sft": sft.run, "reward": reward_model.run}[stage]
    few = {stage: {"steps": 6, "trainer": {"save_steps": 3}}}
    whole, killed = make_run("whole", **few), make_run("killed", **few)
    for config in (whole, killed):
        if stage != "pretrain":
            pretrain.run(config)
        if stage == "reward":
            sft.run(config)
    expected_summary = run(whole)
    with monkeypatch.context() as patch:
        kill_at(4, patch)
        with pytest.raises(Killed):
            run(killed)
    assert RunFolder(killed).summary(stage) is None
    with monkeypatch.context() as patch:
        patch.setattr(Renderer, "tokenize", refuse)
        summary = run(killed)
    assert summary | {"seconds": 0} == expected_summary | {"seconds": 0}
    curves = [
        (Path(config.run.dir) / stage / "metrics.jsonl").read_text() for config in (whole, killed)
    ]
    assert [json.loads(line)["step"] for line in curves[1].splitlines()] == [1, 2, 3, 4, 5, 6]
    assert curves[0] == curves[1]
    expected = weights(whole, stage)
    for name, weight in weights(killed, stage).items():
        assert torch.equal(weight, expected[name]), name


def test_a_signal_ends_training_after_its_step_with_a_checkpoint(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = make_run("whole"), make_run("stopped")
    expected = pretrain.run(whole)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        capsys.readouterr()
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(stopped)
        assert "pretrain stopped: 3/6 steps" in capsys.readouterr().out
    work = pretrain.PretrainTraining(stopped, Path(stopped.run.dir) / "pretrain", "base")
    assert work.last_checkpoint()[0] == 3
    assert RunFolder(stopped).summary("pretrain") is None
    assert pretrain.run(stopped) | {"seconds": 0} == expected | {"seconds": 0}
    for name, weight in weights(stopped, "pretrain").items():
        assert torch.equal(weight, weights(whole, "pretrain")[name]), name


def test_a_signal_in_the_last_step_ends_a_finished_stage(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run()
    interrupt_at(6, monkeypatch)
    assert pretrain.run(config)["steps"] == 6


def test_a_learning_rate_changed_on_resume_is_the_one_that_is_used(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a linear schedule over 6 steps, step 4 has 3/6 of the peak left."""
    few = {"steps": 6, "scheduler": "linear", "warmup_steps": 0, "trainer": {"save_steps": 3}}
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(Killed):
            pretrain.run(make_run(pretrain=few | {"learning_rate": 1e-3}))
    config = make_run(pretrain=few | {"learning_rate": 1e-5})
    pretrain.run(config)
    path = Path(config.run.dir) / "pretrain" / "metrics.jsonl"
    records = map(json.loads, path.read_text().splitlines())
    rates = {
        record["step"]: record["learning_rate"] for record in records if "learning_rate" in record
    }
    expected = [1e-3, 1e-3 * 5 / 6, 1e-3 * 4 / 6, 1e-5 * 3 / 6, 1e-5 * 2 / 6, 1e-5 * 1 / 6]
    assert [rates[step] for step in range(1, 7)] == pytest.approx(expected)


def test_schedule_and_decay_changed_on_resume_are_those_that_are_used(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's saved state holds the old ones: of the linear schedule 3/6 were left."""
    few = {"steps": 6, "warmup_steps": 0, "learning_rate": 1e-3, "trainer": {"save_steps": 3}}
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(Killed):
            pretrain.run(make_run(pretrain=few | {"scheduler": "linear", "weight_decay": 0.0}))
    seen: list[tuple[float, list[float]]] = []

    class _Spy(trainer.StepLog):
        def on_step_begin(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            groups = named["optimizer"].param_groups
            seen.append((groups[0]["lr"], [group["weight_decay"] for group in groups]))

    monkeypatch.setattr(trainer, "StepLog", _Spy)
    pretrain.run(make_run(pretrain=few | {"scheduler": "constant", "weight_decay": 0.1}))
    assert seen == [(1e-3, [0.1, 0.0])] * 3


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_run(pretrain={"steps": 6, "trainer": {"save_steps": 2, "save_total_limit": 5}})
    with monkeypatch.context() as patch:
        kill_at(5, patch)
        with pytest.raises(Killed):
            pretrain.run(config)
    work = supervised.open_training(
        pretrain.PretrainTraining, config, RunFolder(config).base_model()
    )
    assert work.last_checkpoint()[0] == 4
    (work.checkpoints / "checkpoint-4" / "trainer_state.json").write_text('{"global')
    assert work.last_checkpoint() == (2, work.checkpoints / "checkpoint-2")
    assert pretrain.run(config)["steps"] == 6


def test_progress_is_shown_to_the_last_step(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.run(make_run())
    shown = capsys.readouterr().out
    assert "[2/7] pretrain\n" in shown
    assert "[2/7] pretrain done: 6/6 steps in 0:0" in shown
    assert "'loss':" not in shown  # the Trainer's own lines


def test_a_loss_that_is_not_finite_ends_the_stage(make_run: MakeRun) -> None:
    config = make_run(
        pretrain={"learning_rate": 1e30, "scheduler": "constant", "trainer": {"max_grad_norm": 0.0}}
    )
    with pytest.raises(DivergenceError, match=r"pretrain: the loss of step \d is nan; lower"):
        pretrain.run(config)


def test_further_training_arguments_reach_the_trainer(make_run: MakeRun) -> None:
    config = make_run(pretrain={"trainer": {"adam_beta2": 0.5, "gradient_accumulation_steps": 2}})
    work = pretrain.PretrainTraining(config, Path(config.run.dir), "base")
    args = arguments(work, num_processes=2)
    assert args.adam_beta2 == 0.5
    assert args.per_device_train_batch_size == 1  # 4 sequences, 2 processes, 2 rounds
    with pytest.raises(ConfigError, match="batch_size 4 does not divide by train_workers 3 x"):
        arguments(work, num_processes=3)


def test_wrong_training_arguments_are_refused_by_name(make_run: MakeRun) -> None:
    config = make_run(pretrain={"trainer": {"adam_beta3": 0.5}})
    with pytest.raises(ConfigError, match=r"pretrain.trainer.adam_beta3 is not one .* adam_beta\d"):
        pretrain.run(config)
    config = make_run("typed", pretrain={"trainer": {"optim": "no_such_optimizer"}})
    with pytest.raises(ConfigError, match=r"pretrain.trainer: .*no_such_optimizer"):
        pretrain.run(config)


def test_a_full_disk_is_reported_whatever_the_library_raised(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file")

    usage = type("Usage", (), {"free": 0})
    monkeypatch.setattr(supervised, "train", fail)
    with pytest.raises(RuntimeError, match="PytorchStreamWriter"):
        pipeline.run_stage(make_run(), "pretrain")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"The disk is full .*PytorchStreamWriter.* Free space"):
        pipeline.run_stage(make_run("full"), "pretrain")


def test_progress_ends_at_the_last_step_though_few_are_logged(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.run(make_run(pretrain={"trainer": {"logging_steps": 4}}))
    assert "pretrain done: 6/6 steps" in capsys.readouterr().out


def test_a_process_that_does_not_see_the_folder_says_so(make_run: MakeRun, tmp_path: Path) -> None:
    work = pretrain.PretrainTraining(make_run(), tmp_path / "elsewhere", "base")
    with pytest.raises(ConfigError, match=r"run\.dir must be on storage that the training"):
        trainer.train(work, 1)
