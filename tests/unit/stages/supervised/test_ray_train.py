"""What a supervised stage passes through Ray Train's controller."""

import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlhf_ray.config import resolve
from rlhf_ray.stages.supervised import ray_train
from rlhf_ray.stages.supervised.pretrain import PretrainTraining
from rlhf_ray.stages.supervised.trainer import Trained


def test_the_controller_imports_nothing_to_pass_a_training_and_its_result_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = PretrainTraining(resolve({"cluster": {"mode": "local"}}), tmp_path, "base")
    trained = Trained(steps=3, groups=[], before={"loss": 2.0}, after={"loss": 1.0})
    passed: dict[str, Any] = {}
    put: list[Any] = []

    class Trainer:
        def __init__(self, _worker: Any, *, train_loop_config: dict[str, Any], **_: Any) -> None:
            passed.update(train_loop_config)

        def fit(self) -> SimpleNamespace:
            return SimpleNamespace(return_value=pickle.dumps(trained))

    monkeypatch.setattr(ray_train, "_trainer_class", lambda joined: Trainer)
    monkeypatch.setattr(ray, "put", lambda value: put.append(value) or "reference")
    monkeypatch.setattr(ray_train, "_on_gpu", lambda _: False)
    assert ray_train.train_on_ray(training, threading.Event(), print) == trained
    assert passed == {"training": "reference"}
    assert put == [training]
