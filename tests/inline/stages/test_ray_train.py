"""What a supervised stage makes of Ray Train: its errors, its resources and its threads."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from rlhf_ray.cluster import nodes
from rlhf_ray.config import Config
from rlhf_ray.errors import ActorFailure, DataError, DivergenceError, PlacementError, RlhfError
from rlhf_ray.stages.supervised import pretrain, ray_train, reward

MakeRun = Callable[..., Config]


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
    ("cores", "processes", "threads", "alone"),
    [(1, 1, 1, 1), (2, 1, 1, 2), (2, 2, 1, 1), (16, 1, 15, 16), (16, 4, 3, 4)],
)
def test_others_have_one_core_and_a_stage_alone_has_all(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, threads: int, alone: int
) -> None:
    monkeypatch.setattr(ray_train.os, "sched_getaffinity", lambda _: set(range(cores)))
    assert ray_train.num_threads(processes, alone=False) == threads
    assert ray_train.num_threads(processes, alone=True) == alone


@pytest.mark.parametrize(
    ("stage", "stages", "mode", "is_alone"),
    [
        (pretrain.PretrainTraining, ["pretrain", "sft", "reward", "ppo"], "local", True),
        (reward.RewardTraining, ["reward", "ppo"], "local", False),
        (reward.RewardTraining, ["reward"], "local", True),
        (pretrain.PretrainTraining, ["pretrain"], "ray", False),
    ],
)
def test_a_stage_is_alone_on_a_machine_of_its_own_unless_ppo_starts_beside_it(
    make_run: MakeRun, stage: type, stages: list[str], mode: str, is_alone: bool
) -> None:
    config = make_run(run={"stages": stages}, cluster={"mode": mode})
    assert ray_train._is_alone(stage(config, Path("x"), "base")) is is_alone
