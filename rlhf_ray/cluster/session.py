"""The Ray session of a run: a cluster started on this machine, or the one this process is in.

Of the actors' output, only warnings and errors are printed, each once and with the actor's name in
front. Everything else is in Ray's log files, which its dashboard shows.
"""

import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypedDict

import ray
from ray._private import ray_constants
from ray._private.ray_logging import global_worker_stdstream_dispatcher

from rlhf_ray.cluster.connection import require_cluster
from rlhf_ray.cluster.orphans import ProcessRecord, clean_up
from rlhf_ray.cluster.process_titles import CLEANS_UP
from rlhf_ray.cluster.workers import LOOPBACK
from rlhf_ray.config import Config
from rlhf_ray.config.cluster import THREADS
from rlhf_ray.disk import make_private, private_name, temporary_folder
from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.interruption import cleaned_up_by, handlers_kept
from rlhf_ray.observability.phases import LIMIT
from rlhf_ray.observability.progress import Progress
from rlhf_ray.observability.quiet import GC_THRESHOLDS, environment
from rlhf_ray.placement.idle_actors import IDLE

POLL_S = 0.2
NAME_FREE_WITHIN_S = 10.0
"""Time for the actors of an earlier run of the same name to disappear."""
LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"
SOCKET_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")

CARRIED = ExitStack()
"""What a stage carries to the next one of its kind: closed before others, and before Ray ends."""

_OWN_GPUS_ALONE = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "0",
}
"""Ray then sets CUDA_VISIBLE_DEVICES in each process: to the GPUs that it was given, to none where
it was given none. By default a process without GPUs sees all of its node's."""

_SLOW_STARTS = {
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    "RAY_worker_niceness": "0",
}
"""Ray's own deadlines for its processes and for the workers of supervised stages, whose defaults of
60 s are too short for a busy machine; and the priority of its processes. Their default niceness
is 15: beside programs that use all cores they would stand almost still."""

_NO_SPARE_PROCESSES = {"RAY_prestart_worker_first_driver": "0"}
"""By default Ray starts processes as soon as a driver connects. No role can use one: Ray gives a
role, with its environment, a process that began with that environment."""

SOCKET_PATH_BYTES = 107 if sys.platform == "linux" else 103
LONGEST_SOCKET = "/session_2026-11-30_04-33-12_123456_4194304/sockets/plasma_store"
"""The longest name of a socket below Ray's folder."""
LONG_TMPDIR = 60
"""Length of a temporary folder from which on sockets of vLLM and PyTorch in it may not fit."""

ROOTS_PORT = 1
"""A port on which only root can listen."""

RAY_PRINT_HANDLER = "ray_print_logs"
"""The handler with which Ray prints actors' output; Ray removes it by this name at shutdown."""
_SHOWN = re.compile(r"\b(WARNING|ERROR|CRITICAL|FATAL|Traceback)\b|\b\w*(Warning|Error|Exception):")
_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")
"""The parts in which two lines with the same message differ, such as those of two ranks."""


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Start Ray or join its cluster; on leaving, end what was started.

    Raises:
        PlacementError: Ray cannot be started or reached.
        ConfigError: another run on the cluster has this run's name.
    """
    if not config.cluster.runs_on_ray:
        yield
        return
    clean_up()
    os.environ.update(_driver_environment() | dict(os.environ))
    joined = config.cluster.joins_cluster
    record = None if joined else ProcessRecord()
    with cleaned_up_by(record.close) if record else nullcontext():
        try:
            with handlers_kept():
                _connect(config, joined)
            if joined:
                _require_free_name(config.run.name)
            show_warnings(Progress().say)
            yield
        finally:
            CARRIED.close()
            ray.shutdown()
            IDLE.clear()
            if record is not None:
                record.close()
            if joined:
                clean_up()  # after actors that were on this node


def dashboard_url() -> str | None:
    """Return the address of Ray's dashboard; None outside a session."""
    context = ray.get_runtime_context() if ray.is_initialized() else None
    url = ray._private.worker.get_dashboard_url() if context else None  # type: ignore[attr-defined]
    return f"http://{url}" if url else None


def ray_folder() -> Path:
    """Return a private folder for Ray's files whose path leaves room for the names of its sockets.

    It lies in RAY_TMPDIR, else in TMPDIR. These may be too long for that, such as a job's on Slurm;
    then it lies in the system's.

    Raises:
        ConfigError: no folder is short and writable.
    """
    refused = "none is short enough"
    for base in (os.environ.get("RAY_TMPDIR"), temporary_folder(), "/tmp", "/var/tmp"):
        if not base:
            continue
        folder = Path(base) / private_name() / "ray"
        if len(os.fsencode(folder)) + len(LONGEST_SOCKET) > SOCKET_PATH_BYTES:
            continue
        try:
            make_private(folder.parent)
        except ConfigError as error:
            refused = str(error)
        else:
            return folder
    raise ConfigError(
        f"No folder can hold Ray's sockets, whose paths have {SOCKET_PATH_BYTES} bytes at most. "
        f"Tried TMPDIR ({temporary_folder()}), /tmp and /var/tmp: {refused}. Set TMPDIR to a "
        f"writable folder with a path of {SOCKET_PATH_BYTES - len(LONGEST_SOCKET) - 25} bytes or "
        "less"
    )


def _require_free_name(name: str) -> None:
    """Refuse a run.name that another run on the cluster uses.

    A run's actors live in a namespace with its name: two runs would find each other's actors.
    """
    deadline = time.monotonic() + NAME_FREE_WITHIN_S
    while others := ray.util.list_named_actors():  # in this run's namespace
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run.name {name} is in use on this cluster by the actors "
                f"{', '.join(sorted(others))}. Stop that run first (rlhf-ray stop {name}), or "
                "choose another run.name"
            )
        time.sleep(POLL_S)


def _connect(config: Config, joined: bool) -> None:
    shared: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": True,  # filtered by `show_warnings`
        "namespace": f"rlhf_ray-{config.run.name}",
        "runtime_env": {"env_vars": role_environment(config, joined)},
    }
    try:
        if joined:
            require_cluster()
            ray.init(address="auto", **shared)
            return
        shared["runtime_env"]["worker_process_setup_hook"] = _process_setup()
        with _on_loopback():
            ray.init(
                address="local",
                # Ray's own folder, /tmp/ray, is writable by everybody, sessions and sockets too.
                _temp_dir=str(ray_folder()),
                num_cpus=num_logical_cpus(config),
                include_dashboard=config.cluster.dashboard,
                dashboard_host=LOOPBACK,
                # Ray's processes send requests, and the token, to this port also where no dashboard
                # listens: another user's server may.
                **({} if config.cluster.dashboard else {"dashboard_port": ROOTS_PORT}),
                object_store_memory=config.cluster.object_store_mb * 2**20,
                **shared,
            )
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        what = "reach the Ray cluster" if joined else "start Ray on this machine"
        raise PlacementError(f"Cannot {what}: {error}") from error


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Give Ray's node the address 127.0.0.1, the only one with which all its ports are local.

    `ray.init` has no argument for it: 127.0.0.1 given as an address is replaced by the machine's
    address in its network. But a node that may have no peers takes 127.0.0.1 by itself; that is
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which Ray reads at import, so its constant is set here.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _process_setup() -> Callable[[], None]:
    """Return what each process of a cluster of our own runs first.

    It sets RAY_ADDRESS: Ray Train watches its controller through Ray's state API, which without
    RAY_ADDRESS looks for clusters on the machine: among several it raises, or asks the wrong one
    and takes the training for dead. And it sets the garbage collector's thresholds.
    The function is nested so that Ray sends its code instead of importing this module.
    """
    thresholds = GC_THRESHOLDS

    def set_up() -> None:
        import gc
        import os

        import ray

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        gc.set_threshold(*thresholds)

    return set_up


def num_logical_cpus(config: Config) -> int:
    """Return the CPUs to declare to Ray, so that every role of the largest stage gets one.

    The processes share the real cores: five of one CPU each do not fit a two-core machine.
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
    """Return variables of this process and of Ray's own, and put our binaries on PATH.

    DeepSpeed's first build calls ninja, which is installed next to the interpreter.
    """
    binaries = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    if binaries not in path.split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([binaries, path])
    return _SLOW_STARTS | _NO_SPARE_PROCESSES | environment()


def role_environment(config: Config, joined: bool) -> dict[str, str]:
    """Return the environment variables of every role's process.

    They pass through Ray's runtime environment, which everybody with access to the cluster can
    read, so no secret may be among them; secrets belong in the nodes' own environment.
    """
    threads = str(config.cluster.threads_per_actor)
    interface = config.cluster.interface if joined else LOOPBACK_INTERFACE
    return {
        **(dict.fromkeys(SOCKET_VARIABLES, interface) if interface else {}),
        # An engine never spans nodes: its processes meet on loopback.
        "VLLM_HOST_IP": LOOPBACK,
        **environment(),
        **_OWN_GPUS_ALONE,
        **({CLEANS_UP: "1"} if joined else {}),
        "PATH": os.environ["PATH"],
        **dict.fromkeys(THREADS, threads),
        # Else threads spin while they wait for one that has lost its core.
        "OMP_WAIT_POLICY": "passive",
        # vLLM on CPU binds its threads to the first cores: several engines would share one core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Ours renews by progress; a shorter one of vLLM's would end a slow start all the same.
        "VLLM_ENGINE_READY_TIMEOUT_S": str(math.ceil(LIMIT * config.cluster.start_timeout_s)),
        **({} if joined or len(str(temporary_folder())) < LONG_TMPDIR else _short_tmpdir()),
        **config.cluster.env,
    }


def _short_tmpdir() -> dict[str, str]:
    return {"TMPDIR": str(ray_folder().parent)}


class LogBatch(TypedDict):
    """Lines that one process printed, as Ray's dispatcher hands them over."""

    lines: Sequence[str]
    is_err: bool
    actor_name: str | None
    task_name: str | None
    pid: int | str
    ip: str
    localhost: str


class ActorLog:
    """Prints warnings and errors from the lines that Ray collects from the actors."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._shown: set[str] = set()

    def __call__(self, batch: LogBatch) -> None:
        """Print what is worth showing of the ``lines`` of one process; other keys name it."""
        if not batch["is_err"]:
            return
        who = batch.get("actor_name") or batch.get("task_name") or f"process {batch['pid']}"
        where = "" if batch["ip"] == batch["localhost"] else f" on {batch['ip']}"
        for block in _blocks(batch["lines"]):
            message = _NUMBERS.sub("", "\n".join(block))
            if _SHOWN.search(block[0]) and message not in self._shown:
                self._shown.add(message)
                for line in block:
                    self._say(f"{who}{where}: {line}")


def _blocks(lines: Iterable[str]) -> list[list[str]]:
    """Group each line with the lines indented below it, as in a traceback."""
    blocks: list[list[str]] = []
    for line in lines:
        if blocks and line.startswith((" ", "\t")):
            blocks[-1].append(line)
        else:
            blocks.append([line])
    return blocks


def show_warnings(say: Callable[[str], None]) -> None:
    """Replace Ray's printing of actors' output by warnings and errors alone."""
    global_worker_stdstream_dispatcher.remove_handler(RAY_PRINT_HANDLER)
    global_worker_stdstream_dispatcher.add_handler(RAY_PRINT_HANDLER, ActorLog(say))
