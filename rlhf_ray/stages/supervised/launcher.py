"""Runs a supervised stage from the driver: in Ray Train's TorchTrainer, or inline."""

import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import Dataset

from rlhf_ray import interruption
from rlhf_ray.config import Config
from rlhf_ray.config.identity import fixed_keys
from rlhf_ray.data.rendering.tokens import tokenizer_state
from rlhf_ray.disk import DAMAGE, unwritable_is_an_error, write_atomically
from rlhf_ray.models import folders
from rlhf_ray.models.tokenizers import load_tokenizer
from rlhf_ray.models.trainable import parameter_table
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.observability.ray_metrics import ray_sinks
from rlhf_ray.observability.repeated import repeated
from rlhf_ray.observability.sinks import Sinks, TensorBoardSink, read_jsonl
from rlhf_ray.observability.trackers import current, numbers
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.arguments import refuse_unknown_arguments
from rlhf_ray.stages.supervised.ray_train import num_threads, train_on_ray
from rlhf_ray.stages.supervised.trainer import Trained, train
from rlhf_ray.stages.supervised.training import HELD_OUT, TRAIN, Training

T = TypeVar("T", bound=Training)

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
    refuse_unknown_arguments(training.settings)
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


def tokenised(
    training: Training,
    rows_digest: str,
    build: Callable[[], tuple[Mapping[str, Dataset], Mapping[str, Any]]],
) -> tuple[Mapping[str, Dataset], Mapping[str, Any]]:
    """Return a stage's tokenised parts and counts: those stored before, if the same would be built.

    A run that was killed so tokenises nothing again when it resumes.

    Args:
        training: the stage.
        rows_digest: of the rows.
        build: tokenises the rows.

    Raises:
        RlhfError: what ``build`` raises.
        ConfigError: the folder cannot be written.
    """
    config, settings = training.config, training.settings
    given = [
        rows_digest,
        tokenizer_state(load_tokenizer(training.base, training.model_settings)),
        config.template.model_dump_json(),
        config.data.model_dump_json(include={"overlong", "max_bad_share"}),
        settings.model_dump_json(include={*fixed_keys(type(settings))}),
        (config.model.max_length, config.run.seed),
    ]
    digest = hashlib.blake2b(json.dumps(given).encode(), digest_size=16).hexdigest()
    stored = training.stored()
    if stored.get("digest") == digest:
        with suppress(*DAMAGE, OSError):  # they are not whole
            parts = {part: training.load_data(part) for part in (TRAIN, HELD_OUT)}
            return parts, stored["counts"]
    data, counts = build()
    with unwritable_is_an_error(training.data):
        shutil.rmtree(training.data, ignore_errors=True)
        for part, rows in data.items():
            rows.save_to_disk(str(training.data / part))
    # Last: what has this file is whole.
    write_atomically(training.stored_file, json.dumps({"digest": digest, "counts": counts}))
    return data, counts


def run_training(training: Training, num_rows: int) -> Trained:
    """Train one stage to its end, with progress; remove its tokenised data and checkpoints then.

    Args:
        training: the stage, its data stored by `tokenised`.
        num_rows: of the part to train on.

    Raises:
        RlhfError: what a training process raised.
        PlacementError: the cluster is too small for ``<stage>.train_workers``.
        ActorFailure: training processes died, more often than the budget allows.
        KeyboardInterrupt: a signal came; a checkpoint is saved.
    """
    summary = training.folder / "summary.json"
    if summary.is_file():  # trained again: trackers get its steps once more
        current().forget(training.name)
    # First: a stage that has a summary counts as finished, also if it is killed from here on.
    with unwritable_is_an_error(summary):
        summary.unlink(missing_ok=True)
    training = with_steps(training, num_rows)
    done = training.cut_records()
    progress = Progress(training.config.run.stages)
    with (
        progress.stage(training.name, training.settings.steps, "step", done) as bar,
        _following(training, bar, done),
        _interruptible() as interrupted,
    ):
        if training.config.cluster.mode == "inline":
            torch.set_num_threads(num_threads(1, alone=False))
            trained = train(training, 1, interrupted.is_set)
        else:
            trained = train_on_ray(training, interrupted, progress.say)
        if trained is None:
            raise KeyboardInterrupt
    # Not where training fails: a later run resumes from the checkpoints.
    shutil.rmtree(training.data, ignore_errors=True)
    shutil.rmtree(training.checkpoints, ignore_errors=True)
    progress.say(parameter_table(trained.groups))
    return trained


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Yield an event that a signal sets."""
    interrupted = threading.Event()

    def stop(is_late: bool) -> None:
        if is_late:
            raise KeyboardInterrupt
        interrupted.set()

    with interruption.deferred(stop):
        yield interrupted


@dataclass
class _Stream:
    """A file of metrics as it grows, and the sinks that get its new lines."""

    file: Path
    sinks: Sinks
    last_step: int

    def forward(self) -> Iterator[tuple[int, Mapping[str, float]]]:
        """Log new steps to the sinks, none twice; yields each with its metrics."""
        for record in read_jsonl(self.file):
            step, metrics = record["step"], numbers(record)
            if step > self.last_step:
                self.last_step = step
                self.sinks.log(step, metrics)
                yield step, metrics


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
        last = max((record["step"] for record in known), default=-1)
        streams.append(_Stream(file, Sinks([*local, *tracked]), last))

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
