"""Runs of a supervised stage: resume, refusals, failures."""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from rlhf_ray import disk, interruption
from rlhf_ray.cluster import nodes
from rlhf_ray.config import Config
from rlhf_ray.errors import (
    ActorFailure,
    ConfigError,
    DataError,
    DivergenceError,
    PlacementError,
    RlhfError,
)
from rlhf_ray.models import loading
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages import pipeline
from rlhf_ray.stages.supervised import launcher as supervised
from rlhf_ray.stages.supervised import pretrain, ray_train, sft, trainer
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


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward"])
def test_a_killed_stage_resumes_and_ends_as_if_never_killed(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Killed after step 4, last saved at step 3: the same weights and the same curve follow."""
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
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = make_run("whole"), make_run("stopped")
    expected = pretrain.run(whole)
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(stopped)
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


class RayError(Exception):
    """The error with which Ray Train reports failed workers."""

    def __init__(self, *failures: Exception) -> None:
        self.worker_failures = dict(enumerate(failures))


class WrappedError(Exception):
    """The error in which Ray Train wraps a worker's own."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback (most recent call last):\n  ...\nthe last line")
        self._base_exc = cause


def test_an_error_that_a_worker_raised_on_purpose_reaches_the_user(make_run: MakeRun) -> None:
    work = pretrain.PretrainTraining(make_run(), Path("x"), "base")
    meant = DataError("bad rows")
    hung_up = WrappedError(RuntimeError("connection closed by peer"))
    assert ray_train._cause(work, RayError(hung_up, WrappedError(meant))) is meant
    other = ray_train._cause(work, RayError(hung_up))
    assert isinstance(other, ActorFailure)
    assert "pretrain: training process 0 failed: the last line" in str(other)
    assert isinstance(ray_train._cause(work, Exception("no controller")), ActorFailure)


@pytest.mark.parametrize(
    ("failures", "is_loss"),
    [
        ([ActorDiedError(), WrappedError(RuntimeError("[gloo] Connection closed by peer"))], True),
        ([WrappedError(RuntimeError("[gloo] Connection closed by peer"))], True),
        ([WorkerHealthCheckFailedError("rank 1", ActorDiedError())], True),
        ([WrappedError(DivergenceError("loss")), ActorDiedError()], False),
        ([WrappedError(ValueError("twice")), WrappedError(RuntimeError("gloo"))], False),
    ],
)
def test_training_resumes_after_a_loss_but_not_after_an_error(
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    failures: list[Exception],
    *,
    is_loss: bool,
) -> None:
    config = make_run(cluster={"mode": "local", "max_group_restarts": 2})
    work = pretrain.PretrainTraining(config, Path("x"), "base")
    said, attempts = list[str](), list[int]()

    def fit(*_: Any) -> str:
        attempts.append(1)
        if len(attempts) < 3:
            raise WorkerGroupError("lost", dict(enumerate(failures)))
        return "trained"

    monkeypatch.setattr(ray_train, "_fit", fit)
    if is_loss:
        assert ray_train.train_on_ray(work, threading.Event(), said.append) == "trained"
        assert "It resumes from its last checkpoint, step 0 (restart 2 of 2" in said[-1]
    else:
        with pytest.raises(RlhfError):
            ray_train.train_on_ray(work, threading.Event(), said.append)
        assert attempts == [1]


@pytest.mark.parametrize(
    ("resources", "workers", "on_gpu"),
    [({"CPU": 2.0}, 2, False), ({"CPU": 2.0, "GPU": 8.0}, 8, True), ({"CPU": 1.0}, 2, None)],
)
def test_workers_are_placed_on_gpus_where_there_are_any(
    make_run: MakeRun,
    monkeypatch: pytest.MonkeyPatch,
    resources: dict[str, float],
    workers: int,
    on_gpu: bool | None,
) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    config = make_run(
        cluster={"mode": "local"}, pretrain={"train_workers": workers, "batch_size": 8}
    )
    work = pretrain.PretrainTraining(config, Path("x"), "base")
    if on_gpu is None:
        with pytest.raises(PlacementError, match=r"train_workers=2 needs 2 CPUs.*Lower it to 1"):
            ray_train._on_gpu(work)
    else:
        assert ray_train._on_gpu(work) is on_gpu


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, float], list[Any]]:
    """Resources of a cluster whose GPU nodes come when they are asked for, and what is asked."""
    import ray

    resources: dict[str, float] = {"CPU": 4.0}
    asked: list[Any] = []

    def ask(bundles: Sequence[Any], _: Any) -> None:
        asked.append(bundles)
        resources["GPU"] = 2.0

    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(nodes, "request_capacity", ask)
    monkeypatch.setattr(ray_train, "POLL_S", 0.001)
    return resources, asked


@pytest.mark.parametrize(("gpus", "workers"), [(1, 2), (1, 3), (0, 2)])
def test_a_joined_cluster_is_waited_for_until_it_has_gpus(
    make_run: MakeRun, joined: Any, gpus: int, workers: int
) -> None:
    config = make_run(
        cluster={"mode": "ray"},
        placement={"gpus": gpus, "timeout_s": 0.05},
        pretrain={"train_workers": workers, "batch_size": 12},
    )
    work = pretrain.PretrainTraining(config, Path("x"), "base")
    if workers == 3:
        with pytest.raises(
            PlacementError, match=r"needs 3 GPUs; the cluster has 2\. Lower it to 2"
        ):
            ray_train._on_gpu(work)
    else:
        assert ray_train._on_gpu(work) is bool(gpus)
    assert joined[1] == ([[{"GPU": 1.0}] * workers, []] if gpus else [])


@pytest.mark.parametrize(
    ("cores", "processes", "threads"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (16, 1, 15), (16, 4, 3)]
)
def test_one_core_is_left_to_driver_and_ray(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, threads: int
) -> None:
    monkeypatch.setattr(ray_train.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert ray_train.num_threads(processes) == threads
