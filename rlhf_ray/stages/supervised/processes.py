"""Training processes: one TorchTrainer, which consecutive supervised stages share.

Ray Train takes as long to start as a small stage to train. So its processes wait for the next one:
the driver puts a pickled `Training` into Ray's own store, and they put back what came of it. Thus
nothing passes through Ray Train's controller either, a process that would import PyTorch,
Transformers and PEFT to unpickle it.
"""

import gc
import itertools
import os
import pickle
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from rlhf_ray import interruption
from rlhf_ray.config import Config
from rlhf_ray.errors import ActorFailure
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.trainer import Trained
from rlhf_ray.stages.supervised.training import Training

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

LOOK_S = 0.2
"""Seconds between two looks for the next training, or for what came of one."""
END_S = 30.0
"""Longest wait for Ray Train to end processes that train nothing."""
KEYS = b"rlhf_ray"
"""Namespace of our keys in Ray's own store."""


class TrainingProcesses:
    """Processes of Ray Train that train one stage after the other.

    Args:
        work: what each of them runs; called with the name under which they get their trainings.
        config: of the run.
        stage: the first one that they train.
        on_gpu: whether each has a GPU.
    """

    def __init__(
        self,
        work: Callable[[Mapping[str, str]], None],
        config: Config,
        stage: str,
        *,
        on_gpu: bool,
    ) -> None:
        # Else Ray Train moves each worker to a folder of its own, where the config's relative paths
        # point nowhere.
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        from ray.train import RunConfig, ScalingConfig

        self._kind = _kind(config, stage)
        self._name = f"training/{uuid.uuid4().hex}"
        self._number = 0
        self._is_training = False
        self._storage = RunFolder(config).path.resolve() / ".ray_train"
        trainer = _trainer_class(config.cluster.joins_cluster)(
            work,
            train_loop_config={"name": self._name},
            scaling_config=ScalingConfig(
                num_workers=getattr(config, stage).train_workers, use_gpu=on_gpu
            ),
            run_config=RunConfig(name=stage, storage_path=str(self._storage)),
        )
        # In the main thread Ray Train would replace the handler of Ctrl-C.
        self._pool = ThreadPoolExecutor(1, "ray-train")
        self._fitting = self._pool.submit(trainer.fit)

    def fit(self, config: Config, stage: str) -> bool:
        """Return whether they live, and are what a stage needs."""
        return not self._fitting.done() and self._kind == _kind(config, stage)

    def train(self, training: Training, interrupted: threading.Event) -> Trained | None:
        """Train a stage to its end; None where it was interrupted, with a checkpoint.

        Raises:
            Exception: Ray Train's, where processes fail or are lost.
        """
        from ray.cloudpickle.cloudpickle_fast import dumps
        from ray.experimental.internal_kv import (
            _internal_kv_del,
            _internal_kv_get,
            _internal_kv_put,
        )

        task = f"{self._name}/{self._number}"
        self._number += 1
        self._is_training = True
        _internal_kv_put(task, dumps(training), namespace=KEYS)
        is_over = False
        while not is_over:
            is_over = bool(wait([self._fitting], LOOK_S).done)
            if interrupted.is_set():
                _internal_kv_put(interrupted_key(), b"1", namespace=KEYS)
            if (trained := _internal_kv_get(_result(task), namespace=KEYS)) is not None:
                self._is_training = False
                for key in (task, _result(task)):
                    _internal_kv_del(key, namespace=KEYS)
                return pickle.loads(trained)
        self._fitting.result()
        raise ActorFailure(f"{training.name}: Ray Train ended without a result; see its logs")

    def end(self) -> None:
        """End them; those that train, and all after a signal, with Ray's session alone."""
        from ray.experimental.internal_kv import _internal_kv_put

        with suppress(Exception):  # a cluster that does not answer must not keep a run from ending
            if not self._is_training and interruption.exit_code() is None:
                _internal_kv_put(f"{self._name}/{self._number}", b"", namespace=KEYS)
                wait([self._fitting], END_S)
        self._pool.shutdown(wait=False)
        shutil.rmtree(self._storage, ignore_errors=True)


def trainings(name: str, rank: int) -> Iterator[tuple[Training, Callable[[Trained | None], None]]]:
    """Yield in a process each training that it gets, and how to answer; end with the last one."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    for number in itertools.count():
        task = f"{name}/{number}"
        while (given := _internal_kv_get(task, namespace=KEYS)) is None:
            time.sleep(LOOK_S)
        if not given:
            return

        def answer(trained: Trained | None, task: str = task) -> None:
            if rank == 0:
                _internal_kv_put(_result(task), pickle.dumps(trained), namespace=KEYS)

        yield pickle.loads(given), answer
        gc.collect()  # the model that it has trained
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def interrupted_key() -> str:
    """Return the key in Ray's own store that this job's training processes look up."""
    import ray

    return f"interrupted/{ray.get_runtime_context().get_job_id()}"


def _result(task: str) -> str:
    return f"{task}/trained"


def _kind(config: Config, stage: str) -> object:
    """Return what must be alike for a stage to go on with the processes of another one.

    Arguments of its own and DeepSpeed may leave traces in a process.
    """
    settings = getattr(config, stage)
    return settings.train_workers, stage if settings.trainer or settings.zero_stage else None


def _trainer_class(joined: bool) -> "type[TorchTrainer]":
    """Return Ray Train's trainer, on a cluster of the run's own without its cleaner.

    The cleaner frees the workers' placement group if the controller dies: such a cluster ends with
    the driver. It asks Ray's dashboard whether the controller lives; without a dashboard each stage
    would end 10 s later, when that question times out.
    """
    from ray.train.torch import TorchTrainer

    if joined:
        return TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if not isinstance(c, PlacementGroupCleanerCallback)]

    return Trainer
