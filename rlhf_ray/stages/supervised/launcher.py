"""Runs a supervised stage from the driver: in Ray Train's TorchTrainer, or inline."""

import math
import os
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from datasets import Dataset

from rlhf_ray.config import Config
from rlhf_ray.disk import unwritable_is_an_error
from rlhf_ray.errors import ActorFailure, PlacementError, RlhfError
from rlhf_ray.models import folders
from rlhf_ray.models.trainable import parameter_table
from rlhf_ray.observability import quiet
from rlhf_ray.observability.phases import ends_when_stalled
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.observability.ray_metrics import ray_sinks
from rlhf_ray.observability.repeated import repeated
from rlhf_ray.observability.sinks import JsonlSink, Sinks, TensorBoardSink, read_jsonl
from rlhf_ray.observability.trackers import current, numbers
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.arguments import refuse_unknown_arguments
from rlhf_ray.stages.supervised.trainer import Trained, train
from rlhf_ray.stages.supervised.training import TRAIN, Training

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.train.torch import TorchTrainer

T = TypeVar("T", bound=Training)

POLL_S = 1.0
"""Seconds between two checks of the cluster's resources."""
FOLLOW_INTERVAL_S = 0.5
"""Seconds between two reads of the metrics that the training processes write."""


def open_training(kind: type[T], config: Config, base: str) -> T:
    """Make a stage's `Training` with absolute paths, its ``<stage>.trainer`` keys checked.

    Raises:
        ConfigError: an unknown key in ``<stage>.trainer``, or the folder cannot be written.
        DataError: the base is an adapter, which cannot be trained on.
    """
    folders.require_whole(base, kind.name)
    folder = RunFolder(config).stage(kind.name).resolve()
    local = Path(base).is_dir()
    training = kind(config, folder, str(Path(base).resolve()) if local else base)
    refuse_unknown_arguments(kind.name, training.settings.trainer)
    return training


def with_steps(training: Training, num_rows: int) -> Training:
    """Compute ``<stage>.steps`` from ``<stage>.epochs`` where that is given."""
    settings = training.settings
    if settings.epochs is None:
        return training
    steps = math.ceil(settings.epochs * math.ceil(num_rows / settings.batch_size))
    section = settings.model_copy(update={"steps": steps})
    config = training.config.model_copy(update={training.name: section})
    return replace(training, config=config)


def run_training(training: Training, data: Mapping[str, Dataset]) -> Trained:
    """Train one stage to its end, with progress; remove its tokenised data and checkpoints then.

    Raises:
        RlhfError: what a training process raised.
        PlacementError: the cluster is too small for ``<stage>.train_workers``.
        ActorFailure: a training process died.
    """
    summary = training.folder / "summary.json"
    if summary.is_file():  # trained again: trackers get its steps once more
        current().forget(training.name)
    with unwritable_is_an_error(training.data):
        # First: a stage that has a summary counts as finished, also if it is killed from here on.
        summary.unlink(missing_ok=True)
        shutil.rmtree(training.data, ignore_errors=True)
        for split, rows in data.items():
            rows.save_to_disk(str(training.data / split))
    training = with_steps(training, len(data[TRAIN]))
    done, _ = training.last_checkpoint()
    for file in (training.metrics_file, training.evaluations_file):
        JsonlSink(file).truncate_after("step", done)
    progress = Progress(training.config.run.stages)
    with (
        progress.stage(training.name, training.settings.steps, "step", done) as bar,
        _following(training, bar, done),
    ):
        if training.config.cluster.mode == "inline":
            torch.set_num_threads(_num_threads(1))
            trained = train(training, 1)
        else:
            trained = _train_on_ray(training)
    # Not where training fails: a later run resumes from the checkpoints.
    shutil.rmtree(training.data, ignore_errors=True)
    shutil.rmtree(training.checkpoints, ignore_errors=True)
    progress.say(parameter_table(trained.groups))
    return trained


@dataclass
class _Stream:
    """A file of metrics as it grows, and the sinks that get its new lines."""

    file: Path
    sinks: Sinks
    num_seen: int

    def forward(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Log each new line to the sinks; yields its step and metrics."""
        records = read_jsonl(self.file)
        for record in records[self.num_seen :]:
            step, metrics = record["step"], numbers(record)
            self.sinks.log(step, metrics)
            yield step, metrics
        self.num_seen = len(records)


@contextmanager
def _following(training: Training, bar: Bar, done: int) -> Iterator[None]:
    """Forward the metrics as lines appear in files that another process may write."""
    local = ray_sinks(training.config.run.name, training.name)
    if training.config.trackers.tensorboard:
        local.append(TensorBoardSink(training.folder / "tensorboard", purge_step=done + 1))
    streams = []
    for file, part in ((training.metrics_file, ""), (training.evaluations_file, "/eval")):
        known = read_jsonl(file)
        tracked = current().sinks(training.name, "step", known, part)
        streams.append(_Stream(file, Sinks([*local, *tracked]), len(known)))

    def forward() -> None:
        for stream in streams:
            for step, metrics in stream.forward():
                if "loss" in metrics:
                    bar.advance(step - bar.done, loss=metrics["loss"])

    try:
        with repeated(forward, FOLLOW_INTERVAL_S, "follow metrics"):
            yield
    finally:
        forward()
        for sink in local:
            sink.close()
    if bar.total is not None and bar.total > bar.done:
        bar.advance(bar.total - bar.done)  # the last steps may not be logged


def _train_on_ray(training: Training) -> Trained:
    # Else Ray Train moves each worker to a folder of its own, where the config's relative paths
    # point nowhere.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    storage = training.folder / "ray"
    # Arguments and results pass through Ray Train's controller, a process that would import all of
    # PyTorch, Transformers and PEFT to unpickle them: it sees a reference, and bytes.
    trainer = _trainer_class(training.config.cluster.joins_cluster)(
        _train_worker,
        train_loop_config={"training": ray.put(training)},
        scaling_config=ScalingConfig(
            num_workers=training.settings.train_workers, use_gpu=_on_gpu(training)
        ),
        run_config=RunConfig(
            name=training.name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    try:
        trained = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _cause(training, error) from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if trained is None:
        raise ActorFailure(f"{training.name}: Ray Train ended without a result; see its logs")
    return pickle.loads(trained)


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


def _train_worker(loop_config: "Mapping[str, ObjectRef[Training]]") -> bytes:
    """Train in a process that Ray Train started; return the pickled `Trained`."""
    quiet.silence_dependencies()
    import ray
    from ray.train import get_context

    from rlhf_ray.cluster.workers import FETCH_TIMEOUT_S

    training = ray.get(loop_config["training"], timeout=FETCH_TIMEOUT_S)
    context = get_context()
    # Ray sets OMP_NUM_THREADS=1 for a one-CPU actor, but nothing else runs during the training.
    torch.set_num_threads(_num_threads(context.get_local_world_size()))
    who = f"{training.name}-{context.get_world_rank()}"
    limit_s = training.config.cluster.call_timeout_s
    with ends_when_stalled(limit_s, "cluster.call_timeout_s", who):
        return pickle.dumps(train(training, context.get_world_size()))


def _on_gpu(training: Training) -> bool:
    """Decide whether to train on GPUs; waits for nodes where an autoscaler may add them.

    Raises:
        PlacementError: the cluster has fewer GPUs (or CPUs, if it trains on them) than processes.
    """
    import ray

    from rlhf_ray.cluster.ray_workers import request_capacity

    may_grow, settings = training.config.cluster.joins_cluster, training.config.placement
    has_gpus = may_grow or bool(ray.cluster_resources().get("GPU"))
    kind = "GPU" if settings.gpus != 0 and has_gpus else "CPU"
    needed, deadline = training.settings.train_workers, time.monotonic() + settings.timeout_s
    available = int(ray.cluster_resources().get(kind, 0))
    if may_grow and available < needed:
        request_capacity([{kind: 1.0}] * needed, [{}] * needed)
        try:
            while available < needed and time.monotonic() < deadline:
                time.sleep(POLL_S)
                available = int(ray.cluster_resources().get(kind, 0))
        finally:
            request_capacity([], [])
    if needed > available:
        remedy = f"Lower it to {available} or add nodes"
        raise PlacementError(
            f"{training.name}.train_workers={needed} needs {needed} {kind}s; the cluster has "
            f"{available}. {remedy if available else 'For a cluster of CPUs set placement.gpus=0'}"
        )
    return kind == "GPU"


def _cause(training: Training, error: Exception) -> RlhfError:
    """Return the error that a training process raised on purpose, else one with its last line."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        raised = getattr(failure, "_base_exc", failure)
        if isinstance(raised, RlhfError):
            return raised
    rank, failure = next(iter(failures.items()), (0, error))
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return ActorFailure(
        f"{training.name}: training process {rank} failed: {lines[-1]}\nRun the same command again "
        "to resume from its last checkpoint; if it ran out of memory, set "
        f"{training.name}.gradient_checkpointing=true, or begin a new run (run.resume=never) with "
        f"a lower {training.name}.batch_size"
    )


def _num_threads(num_processes: int) -> int:
    """Return the threads of each training process here; one core is left to driver and Ray.

    One thread too many costs far more than it gives: OpenMP's threads spin while they wait for one
    that has lost its core (measured on two busy cores: two threads took nine times as long as one).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    num_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, (num_cores - 1) // num_processes)
