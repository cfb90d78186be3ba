"""What supervised stages pass to Ray Train's processes, and which stages share them."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.experimental import internal_kv

from rlhf_ray.cluster.session import CARRIED
from rlhf_ray.config import resolve
from rlhf_ray.errors import ActorFailure
from rlhf_ray.stages.supervised import processes, ray_train
from rlhf_ray.stages.supervised.pretrain import PretrainTraining
from rlhf_ray.stages.supervised.processes import trainings
from rlhf_ray.stages.supervised.sft import SftTraining
from rlhf_ray.stages.supervised.trainer import Trained
from rlhf_ray.stages.supervised.training import Training


class RayTrain:
    """Ray Train: its "processes" are a thread that answers each training with its name."""

    def __init__(self) -> None:
        self.passed: list[dict[str, Any]] = []
        self.trained: list[tuple[int, str]] = []
        self.lose = False

    def __call__(self, _work: Any, *, train_loop_config: Any, **_: Any) -> SimpleNamespace:
        self.passed.append(train_loop_config)
        number = len(self.passed)

        def fit() -> None:
            for training, answer in trainings(train_loop_config["name"], rank=0):
                self.trained.append((number, training.name))
                answer(Trained(steps=3, groups=[], before={"loss": 2.0}, after={"loss": 1.0}))
                if self.lose:
                    raise ActorFailure("lost while it waited")

        return SimpleNamespace(fit=fit)


@pytest.fixture
def ray_train_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[RayTrain]:
    made, store = RayTrain(), dict[str, bytes]()
    monkeypatch.setattr(internal_kv, "_internal_kv_get", lambda key, namespace: store.get(key))
    monkeypatch.setattr(
        internal_kv, "_internal_kv_put", lambda key, value, namespace: store.update({key: value})
    )
    monkeypatch.setattr(internal_kv, "_internal_kv_del", lambda key, namespace: store.pop(key))
    monkeypatch.setattr(processes, "LOOK_S", 0.01)
    monkeypatch.setattr(processes, "_trainer_class", lambda joined: made)
    monkeypatch.setattr(ray_train, "_on_gpu", lambda _: False)
    yield made
    CARRIED.close()


def training(tmp_path: Path, kind: type[Training] = PretrainTraining, **keys: object) -> Training:
    values = {"cluster": {"mode": "local"}, kind.name: keys}
    return kind(resolve(values), tmp_path / kind.name, "base")


def train(work: Training) -> Trained | None:
    return ray_train.train_on_ray(work, threading.Event(), print)


def test_the_controller_imports_nothing_to_pass_a_training_and_its_result_on(
    tmp_path: Path, ray_train_runs: RayTrain
) -> None:
    trained = train(training(tmp_path))
    assert trained == Trained(steps=3, groups=[], before={"loss": 2.0}, after={"loss": 1.0})
    assert [list(map(type, passed.values())) for passed in ray_train_runs.passed] == [[str]]


def test_consecutive_stages_share_processes_where_they_need_the_same(
    tmp_path: Path, ray_train_runs: RayTrain
) -> None:
    train(training(tmp_path))
    train(training(tmp_path, SftTraining))
    train(training(tmp_path, SftTraining, train_workers=2))
    train(training(tmp_path, SftTraining, train_workers=2, trainer={"optim": "sgd"}))
    expected = [(1, "pretrain"), (1, "sft"), (2, "sft"), (3, "sft")]
    assert ray_train_runs.trained == expected
    CARRIED.close()  # as the pipeline does before any other stage
    train(training(tmp_path, SftTraining))
    assert ray_train_runs.trained == [*expected, (4, "sft")]


def test_processes_that_died_between_two_stages_are_replaced(
    tmp_path: Path, ray_train_runs: RayTrain
) -> None:
    ray_train_runs.lose = True
    train(training(tmp_path))
    (waiting,) = ray_train._waiting
    with pytest.raises(ActorFailure, match="while it waited"):
        waiting._fitting.result(10)
    train(training(tmp_path, SftTraining))
    assert ray_train_runs.trained == [(1, "pretrain"), (2, "sft")]
