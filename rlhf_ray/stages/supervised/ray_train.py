"""Trains a supervised stage in the processes of Ray Train's TorchTrainer."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import torch

from rlhf_ray.cluster.session import CARRIED
from rlhf_ray.config import Config
from rlhf_ray.config.stages import BEFORE_PPO
from rlhf_ray.errors import ActorFailure, PlacementError, RlhfError
from rlhf_ray.observability import quiet
from rlhf_ray.observability.phases import ends_when_stalled
from rlhf_ray.observability.repeated import repeated
from rlhf_ray.placement.idle_actors import needs_no_slots
from rlhf_ray.stages.supervised.processes import (
    KEYS,
    TrainingProcesses,
    interrupted_key,
    trainings,
)
from rlhf_ray.stages.supervised.trainer import Trained, train
from rlhf_ray.stages.supervised.training import Training

POLL_S = 1.0
"""Seconds between two checks of the cluster's resources, or of a signal."""

_waiting: list[TrainingProcesses] = []
"""The processes of the last stage, which wait for the next one; at most one entry."""


def train_on_ray(
    training: Training, interrupted: threading.Event, say: Callable[[str], None]
) -> Trained | None:
    """Train in Ray Train's processes; where some are lost, in new ones from the last checkpoint."""
    # Ray Train's own budget would also repeat errors that come again.
    from ray.exceptions import RayActorError
    from ray.train import TrainingFailedError

    budget = training.config.cluster.max_group_restarts
    for restarts in itertools.count(1):
        try:
            return _fit(training, interrupted)
        except (TrainingFailedError, RayActorError) as error:
            if interrupted.is_set():
                return None
            cause = _cause(training, error)
            if restarts > budget or not _is_loss(error):
                raise cause from error
            say(
                f"{str(cause).splitlines()[0]}. It resumes from its last checkpoint, step "
                f"{training.cut_records()} (restart {restarts} of {budget}, "
                "cluster.max_group_restarts)"
            )
    raise AssertionError


def begin_ahead(config: Config, stage: str) -> None:
    """Start a stage's processes before it has data for them, where that takes nothing of others."""
    if needs_no_slots(config):
        _begin(config, stage, lambda: False)


def _begin(config: Config, stage: str, on_gpu: Callable[[], bool]) -> TrainingProcesses:
    """Return the processes of the stage before, if they fit, else new ones."""
    if not (_waiting and _waiting[0].fit(config, stage)):
        CARRIED.close()  # their resources, first
        _waiting.append(TrainingProcesses(_train_worker, config, stage, on_gpu=on_gpu()))
        CARRIED.callback(lambda: _waiting.pop().end())
    return _waiting[0]


def _fit(training: Training, interrupted: threading.Event) -> Trained | None:
    processes = _begin(training.config, training.name, lambda: _on_gpu(training))
    trained = None
    try:
        trained = processes.train(training, interrupted)
    finally:
        if trained is None:  # interrupted, failed or lost
            CARRIED.close()
    return trained


def _train_worker(loop_config: Mapping[str, str]) -> None:
    """Train in a process that Ray Train started."""
    quiet.silence_dependencies()
    from ray.experimental.internal_kv import _internal_kv_get
    from ray.train import get_context

    context = get_context()
    key, interrupted = interrupted_key(), threading.Event()

    def look() -> None:
        with suppress(Exception):  # a head that does not answer just now is asked again
            if _internal_kv_get(key, namespace=KEYS):
                interrupted.set()

    for training, answer in trainings(loop_config["name"], context.get_world_rank()):
        # Ray sets OMP_NUM_THREADS=1 for a one-CPU actor, but little else runs during the training.
        threads = num_threads(context.get_local_world_size(), alone=_is_alone(training))
        torch.set_num_threads(threads)
        who = f"{training.name}-{context.get_world_rank()}"
        limit_s = training.config.cluster.call_timeout_s
        with (
            ends_when_stalled(limit_s, "cluster.call_timeout_s", who),
            repeated(look, POLL_S, "interruption"),
        ):
            answer(train(training, context.get_world_size(), interrupted.is_set))


def _on_gpu(training: Training) -> bool:
    """Decide whether to train on GPUs; waits for nodes where an autoscaler may add them.

    Raises:
        PlacementError: the cluster has fewer GPUs (or CPUs, if it trains on them) than processes.
    """
    import ray

    from rlhf_ray.cluster.nodes import request_capacity

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
        if isinstance(raised := _raised(failure), RlhfError):
            return raised
    rank, failure = next(iter(failures.items()), (0, error))
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return ActorFailure(
        f"{training.name}: training process {rank} failed: {lines[-1]}\nRun the same command again "
        "to resume from its last checkpoint; if it ran out of memory, set "
        f"{training.name}.gradient_checkpointing=true, or begin a new run (run.resume=never) with "
        f"a lower {training.name}.batch_size"
    )


def _is_loss(error: Exception) -> bool:
    """Return whether training processes were lost, and none has raised what it would raise again.

    A survivor's error, of a collective without its peer, may be all that is seen of a loss.
    """
    from rlhf_ray.cluster.ray_workers import DEATHS

    failures = getattr(error, "worker_failures", None) or {0: error}
    raised = [_raised(failure) for failure in failures.values()]
    if any(isinstance(failure, RlhfError) for failure in raised):
        return False
    if any(isinstance(failure, DEATHS) for failure in raised):
        return True
    return all(
        isinstance(failure, torch.distributed.DistError) or "gloo" in str(failure)
        for failure in raised
    )


def _raised(failure: Exception) -> BaseException:
    """Return the error that Ray Train has wrapped."""
    for name in ("_base_exc", "health_check_failure"):
        failure = getattr(failure, name, failure)
    return failure


def _is_alone(training: Training) -> bool:
    """Return whether the run has a machine of its own, on which nothing else computes meanwhile."""
    config = training.config
    starts_ppo = training.name in BEFORE_PPO and "ppo" in config.run.stages
    return not config.cluster.joins_cluster and not starts_ppo


def num_threads(num_processes: int, *, alone: bool) -> int:
    """Return the threads of each training process here; others, if there are, have one core.

    One thread too many costs more than it gives. On two cores, of which another process has one, a
    step takes 1.4 times as long with two threads as with one; nine times, if OpenMP's threads spin
    while they wait for one that has lost its core (roles' environment tells them to sleep).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    num_cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, (num_cores if alone else num_cores - 1) // num_processes)
