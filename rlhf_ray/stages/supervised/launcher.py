"""Runs a supervised stage from the driver: in Ray Train's TorchTrainer, or inline."""

import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset

from rlhf_ray.config import Config
from rlhf_ray.errors import ActorFailure, DataError, PlacementError, RlhfError
from rlhf_ray.models import folders
from rlhf_ray.models.parameters import ParameterGroup, parameter_table
from rlhf_ray.observability import quiet
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.observability.ray_metrics import ray_sinks
from rlhf_ray.observability.repeated import repeated
from rlhf_ray.observability.sinks import JsonlSink, Sinks, TensorBoardSink, read_jsonl
from rlhf_ray.observability.trackers import current, numbers
from rlhf_ray.runs.folder import RunFolder, unwritable_is_an_error
from rlhf_ray.stages.supervised.training import (
    TRAIN,
    Training,
    refuse_unknown_arguments,
    steps_done,
    train,
)

T = TypeVar("T", bound=Training)

POLL_S = 1.0
"""Seconds between two looks at what the cluster has."""
FOLLOW_INTERVAL_S = 0.5
"""Seconds between two looks at the metrics that the training processes write."""


def open_training(kind: type[T], config: Config, base: str) -> T:
    """A stage's work with absolute paths, its ``<stage>.trainer`` keys checked.

    Raises:
        ConfigError: an unknown key in ``<stage>.trainer``, or the folder cannot be written.
        DataError: the base is an adapter, which cannot be trained on.
    """
    if folders.is_adapter(base):
        raise DataError(
            f"{base} is an adapter; the stage {kind.name} trains on a whole model: merge it first "
            "(command merge)"
        )
    folder = RunFolder(config).stage(kind.name).resolve()
    local = Path(base).is_dir()
    training = kind(config, folder, str(Path(base).resolve()) if local else base)
    refuse_unknown_arguments(training)
    return training


def with_steps(training: Training, num_rows: int) -> Training:
    """The same work with ``<stage>.steps`` of its own where ``<stage>.epochs`` is given.

    Args:
        training: from `open_training`.
        num_rows: to train on; the last batch of a pass may be a smaller one.
    """
    settings = training.settings
    if settings.epochs is None:
        return training
    steps = math.ceil(settings.epochs * math.ceil(num_rows / settings.batch_size))
    section = settings.model_copy(update={"steps": steps})
    config = training.config.model_copy(update={training.name: section})
    return replace(training, config=config)


def run_training(training: Training, data: Mapping[str, Dataset]) -> dict[str, Any]:
    """Train one stage to its end, showing progress; what training alone needed is removed then.

    Args:
        training: from `open_training`.
        data: tokenised rows, keys ``training.TRAIN`` and ``training.HELD_OUT``.

    Returns:
        What `training.train` returns.

    Raises:
        RlhfError: what a training process raised.
        PlacementError: the cluster is too small for ``<stage>.train_workers``.
        ActorFailure: a training process died.
    """
    summary = training.folder / "summary.json"
    if summary.is_file():
        current().forget(training.name)
    with unwritable_is_an_error(training.data):
        summary.unlink(missing_ok=True)
        shutil.rmtree(training.data, ignore_errors=True)
        for split, rows in data.items():
            rows.save_to_disk(str(training.data / split))
    training = with_steps(training, len(data[TRAIN]))
    done = steps_done(training)
    for file in (training.metrics_file, training.evaluations_file):
        JsonlSink(file).truncate_after("step", done)
    inline = training.config.cluster.mode == "inline"
    progress = Progress(training.config.run.stages)
    with (
        progress.stage(training.name, training.settings.steps, "step", done) as bar,
        _following(training, bar, done),
    ):
        results = _train_inline(training) if inline else _train_on_ray(training)
    shutil.rmtree(training.data, ignore_errors=True)
    shutil.rmtree(training.checkpoints, ignore_errors=True)
    progress.say(parameter_table([ParameterGroup(**g) for g in results["parameter_groups"]]))
    return results


@dataclass
class _Stream:
    """A file of metrics as it grows, and who is told what appears in it."""

    file: Path
    sinks: Sinks
    num_seen: int

    def news(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Step and metrics of each line that is new; the sinks are told first."""
        records = read_jsonl(self.file)
        for record in records[self.num_seen :]:
            step, metrics = record["step"], numbers(record)
            self.sinks.log(step, metrics)
            yield step, metrics
        self.num_seen = len(records)


@contextmanager
def _following(training: Training, bar: Bar, done: int) -> Iterator[None]:
    """Pass on the metrics as lines appear in files that another process may write."""
    local = ray_sinks(training.config.run.name, training.name)
    if training.config.trackers.tensorboard:
        local.append(TensorBoardSink(training.folder / "tensorboard", purge_step=done + 1))
    streams = []
    for file, part in ((training.metrics_file, ""), (training.evaluations_file, "/eval")):
        known = read_jsonl(file)
        tracked = current().sinks(training.name, "step", known, part)
        streams.append(_Stream(file, Sinks([*local, *tracked]), len(known)))

    def look() -> None:
        for stream in streams:
            for step, metrics in stream.news():
                if "loss" in metrics:
                    bar.advance(step - bar.done, loss=metrics["loss"])

    try:
        with repeated(look, FOLLOW_INTERVAL_S, "follow metrics"):
            yield
    finally:
        look()
        for sink in local:
            sink.close()
    if bar.total is not None and bar.total > bar.done:
        bar.advance(bar.total - bar.done)  # not every step is logged


def _train_inline(training: Training) -> dict[str, Any]:
    torch.set_num_threads(_num_threads(1))
    return train(training, 1)


def _train_on_ray(training: Training) -> dict[str, Any]:
    # Paths in the config are relative to where the run was started, not to a worker's folder.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    storage = training.folder / "ray"
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"training": training},
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
        numbers = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _cause(training, error) from error
    finally:
        shutil.rmtree(storage, ignore_errors=True)
    if numbers is None:
        raise ActorFailure(f"{training.name}: Ray Train ended without a result; see its logs")
    return numbers


def _train_worker(loop_config: Mapping[str, Training]) -> dict[str, Any]:
    """Runs in each process that Ray Train starts."""
    quiet.silence_dependencies()
    from ray.train import get_context

    context = get_context()
    # Ray sets one thread for a one-CPU actor, but here nothing runs beside the training.
    torch.set_num_threads(_num_threads(context.get_local_world_size()))
    return train(loop_config["training"], context.get_world_size())


def _on_gpu(training: Training) -> bool:
    """Whether to train on GPUs; where nodes may join, room is waited for.

    Raises:
        PlacementError: fewer GPUs, or CPUs where those are asked for, than training processes.
    """
    import ray

    from rlhf_ray.cluster.ray_workers import ask_for_room
    from rlhf_ray.cluster.session import joins_cluster

    may_grow, settings = joins_cluster(training.config), training.config.placement
    has_gpus = may_grow or bool(ray.cluster_resources().get("GPU"))
    kind = "GPU" if settings.gpus and has_gpus else "CPU"
    wanted, deadline = training.settings.train_workers, time.monotonic() + settings.timeout_s
    there = int(ray.cluster_resources().get(kind, 0))
    if may_grow and there < wanted:
        ask_for_room([{kind: 1.0}] * wanted, [{}] * wanted)
        try:
            while there < wanted and time.monotonic() < deadline:
                time.sleep(POLL_S)
                there = int(ray.cluster_resources().get(kind, 0))
        finally:
            ask_for_room([], [])
    if wanted > there:
        remedy = f"Lower it to {there} or add nodes"
        raise PlacementError(
            f"{training.name}.train_workers={wanted} needs {wanted} {kind}s; the cluster has "
            f"{there}. {remedy if there else 'For a cluster of CPUs set placement.gpus=0'}"
        )
    return kind == "GPU"


def _cause(training: Training, error: Exception) -> RlhfError:
    """What a training process raised on purpose, or else a message that names its last words."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        raised = getattr(failure, "_base_exc", failure)
        if isinstance(raised, RlhfError):
            return raised
    rank, failure = next(iter(failures.items()), (0, error))
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return ActorFailure(
        f"{training.name}: training process {rank} failed: {lines[-1]}\nRun the same command again "
        "to go on from its last checkpoint; with less memory, lower "
        f"{training.name}.batch_size or set {training.name}.gradient_checkpointing=true"
    )


def _num_threads(num_processes: int) -> int:
    """Threads of each of this machine's training processes; one core is left to driver and Ray.

    A thread too many costs far more than it gives: OpenMP's threads spin while they wait for one
    that has lost its core (measured on two busy cores: two threads took nine times as long as one).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    num_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, (num_cores - 1) // num_processes)
