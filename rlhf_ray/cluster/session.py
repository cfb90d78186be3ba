"""Ray for the length of a run: a cluster on this machine, or the one that we are in."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray._private import ray_constants

from rlhf_ray.cluster.actor_logs import show_warnings
from rlhf_ray.cluster.orphans import ProcessRecord, sweep
from rlhf_ray.cluster.role_clients import LOOPBACK
from rlhf_ray.config import Config
from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.observability.progress import Progress
from rlhf_ray.observability.quiet import environment

POLL_S = 0.2
FREE_WITHIN_S = 10.0
"""For what a run's last process has left to be gone from the cluster."""
LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"


def runs_on_ray(config: Config) -> bool:
    """Whether roles are Ray actors."""
    return config.cluster.mode != "inline"


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Start or join Ray; on the way out end what was started.

    Raises:
        PlacementError: Ray cannot be started or reached.
        ConfigError: another run on the cluster has this run's name.
    """
    if not runs_on_ray(config):
        yield
        return
    sweep()
    os.environ.update(_driver_environment() | dict(os.environ))
    joined = joins_cluster(config)
    record = None if joined else ProcessRecord()
    try:
        with _own_sigterm():
            _connect(config, joined)
        if joined:
            _require_free(config.run.name)
        show_warnings(Progress().say)
        yield
    finally:
        ray.shutdown()
        if record is not None:
            record.close()


def dashboard_url() -> str | None:
    """Address of Ray's dashboard, while a session is on."""
    context = ray.get_runtime_context() if ray.is_initialized() else None
    url = ray._private.worker.get_dashboard_url() if context else None  # type: ignore[attr-defined]
    return f"http://{url}" if url else None


def joins_cluster(config: Config) -> bool:
    """Whether the run's Ray is the cluster that this process belongs to."""
    if config.cluster.mode == "auto":
        return "RAY_JOB_ID" in os.environ or "RAY_ADDRESS" in os.environ
    return config.cluster.mode == "ray"


def require_durable_folder(config: Config) -> None:
    """Refuse a folder that would lie in the copy of the working folder, which Ray deletes.

    Raises:
        ConfigError: ``run.dir`` is relative.
    """
    if not Path(config.run.dir).is_absolute():
        raise ConfigError(
            f"run.dir {config.run.dir} is relative: on a cluster it would lie in a folder that Ray "
            "deletes after the job. Set run.dir to an absolute path that outlives the job, such as "
            f"run.dir=/mnt/shared/{config.run.dir}"
        )


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's way to end at SIGTERM, which Ray replaces by a bare exit."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _require_free(name: str) -> None:
    """Actors are known by the run's name, so two runs of one name would meet."""
    deadline = time.monotonic() + FREE_WITHIN_S
    while others := ray.util.list_named_actors():  # in this run's namespace
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run.name {name} is in use on this cluster, by {', '.join(sorted(others))}: stop "
                f"that run first (rlhf-ray stop {name}), or choose another run.name"
            )
        time.sleep(POLL_S)


def _connect(config: Config, joined: bool) -> None:
    shared = {
        "logging_level": logging.ERROR,
        "log_to_driver": True,  # of which `show_warnings` picks
        "namespace": f"rlhf_ray-{config.run.name}",
        "runtime_env": {"env_vars": role_environment(config, joined)},
    }
    try:
        if joined:
            ray.init(address="auto", **shared)
            return
        with _on_loopback():
            ray.init(
                address="local",
                num_cpus=num_logical_cpus(config),
                include_dashboard=config.cluster.dashboard,
                dashboard_host=LOOPBACK,
                object_store_memory=config.cluster.object_store_mb * 2**20,
                **shared,
            )
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        what = "reach the Ray cluster" if joined else "start Ray on this machine"
        raise PlacementError(f"Cannot {what}: {error}") from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray's node gets the address 127.0.0.1, the only one with which all its ports are local.

    Asked for by name, Ray replaces it by the machine's address in its network; where it may have no
    other nodes (RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, read when it was imported) it takes it itself.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def num_logical_cpus(config: Config) -> int:
    """CPUs to declare, so that every role of the largest stage finds one.

    They share the real cores: five processes of one CPU each would not fit a two-core machine.
    """
    autoscale = config.rollout.autoscale
    ppo = (
        max(config.generators.num, autoscale.maximum if autoscale else 0)
        + config.policy.num_ranks
        + config.critic.num_ranks
        + config.reference.num_processes
        + config.reward.num_workers
    )
    # Ray Train asks for one CPU a worker and one for its controller.
    trained = (config.pretrain, config.sft, config.reward, config.dpo)
    training = 2 + max(stage.train_workers for stage in trained)
    return max(ppo, training, os.cpu_count() or 1)


def _driver_environment() -> dict[str, str]:
    """Of this process and Ray's own; ninja must be on PATH for DeepSpeed's first build."""
    binaries = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if binaries not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([binaries, path])
    return environment()


def role_environment(config: Config, joined: bool) -> dict[str, str]:
    """Variables of every role's process. They pass through Ray's runtime environment, which all who
    may ask the cluster can read: no secret is among them; those are in the nodes' environment."""
    threads = str(config.cluster.threads_per_actor)
    interface = config.cluster.interface if joined else LOOPBACK_INTERFACE
    bound = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {
        **(dict.fromkeys(bound, interface) if interface else {}),
        # An engine is never spread over nodes: its processes meet on their own.
        "VLLM_HOST_IP": LOOPBACK,
        **environment(),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Several engines on one machine would all be bound to its first core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **config.cluster.env,
    }
