"""Kinds of GPUs, and the nodes of a cluster: parsed from text, read from Ray, or this machine."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.placement.layout import Node

LIVE_NODES_MODULE = "rlhf_ray.doctor.live_nodes"
"""Run as a process, so this room need not import doctor, which is above it."""
LIVE_NODES_TIMEOUT_S = 45.0
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class GpuKind:
    """The data of one GPU; a GB is 10^9 bytes."""

    memory_gb: float
    """As the driver reports it; the number in the name is rounded, and in GiB for some."""
    bf16_tflops: float
    """Dense, on the tensor cores; fp16 for a kind without bf16."""
    memory_gb_per_s: float
    """Bandwidth of its memory."""
    link_gb_per_s: float
    """Bandwidth to another GPU of the node, one way: NVLink, else PCIe."""
    ray_names: tuple[str, ...]
    """Its names in Ray: from the driver's name and without the memory size, unless nodes are
    labelled by hand (``ray.util.accelerators``)."""
    has_bf16: bool = True
    """Whether it computes in bfloat16, as all do since Ampere."""


GPU_KINDS: dict[str, GpuKind] = {
    "B200-192GB": GpuKind(192.3, 2250, 8000, 900, ("B200",)),
    "H200-141GB": GpuKind(150.8, 989, 4800, 450, ("H200",)),
    "H100-80GB": GpuKind(85.5, 989, 3350, 450, ("H100",)),
    "A100-40GB": GpuKind(42.9, 312, 1555, 300, ("A100", "A100-40G")),
    "A100-80GB": GpuKind(85.9, 312, 2039, 300, ("A100", "A100-80G")),
    "L40S-48GB": GpuKind(48.3, 362, 864, 32, ("L40S",)),
    "A6000-48GB": GpuKind(51.5, 155, 768, 56, ("RTX-A6000",)),
    "A10G-24GB": GpuKind(24.1, 70, 600, 32, ("A10G",)),
    "L4-24GB": GpuKind(24.2, 121, 300, 32, ("L4",)),
    "V100-16GB": GpuKind(17.2, 125, 900, 150, ("V100",), has_bf16=False),
    "V100-32GB": GpuKind(34.4, 125, 900, 150, ("V100",), has_bf16=False),
    "T4-16GB": GpuKind(16.1, 65, 320, 16, ("T4",), has_bf16=False),
    "RTX4090-24GB": GpuKind(25.8, 165, 1008, 32, ("GeForce-RTX-4090",)),
}
"""From the makers' data sheets: NVIDIA A100 (2021), H100 and H200 (SXM), B200 (HGX), L40S, L4, V100
(SXM2), T4, RTX A6000; A10G: those of the A10, at AWS's clock; RTX 4090: Ada whitepaper, with fp32
accumulation. Memory is what nvidia-smi shows."""

NETWORK_GB_PER_S = 12.5
"""Bandwidth between nodes: 100 Gbit/s, the least that training nodes are sold with."""

_GROUP = re.compile(r"(?:(\d+)x)?(\d+)x([A-Za-z].*)")


def parse_cluster(text: str) -> tuple[Node, ...]:
    """Parse a description of a cluster.

    Args:
        text: ``3x8xA100-80GB`` (nodes x GPUs x kind), ``8xH100-80GB`` (one node); groups of
            different nodes are joined by ``+``.

    Raises:
        ConfigError: it has another form, or names an unknown kind of GPU.
    """
    nodes: list[Node] = []
    for group in text.split("+"):
        match = _GROUP.fullmatch(group.strip())
        if match is None or "0" in (match[1], match[2]):
            raise ConfigError(
                f"--cluster {text}: {group!r} is not NODESxGPUSxKIND; write for example "
                "3x8xA100-80GB, 8xA100-80GB+2x4xL40S-48GB for different nodes, or live for the "
                "cluster that is running"
            )
        if match[3] not in GPU_KINDS:
            raise ConfigError(
                f"--cluster {text}: {match[3]!r} is not a known kind of GPU; known are "
                f"{', '.join(GPU_KINDS)}"
            )
        nodes += [
            Node(f"node-{len(nodes) + number}", int(match[2]), gpu_kind=match[3])
            for number in range(int(match[1] or 1))
        ]
    return tuple(nodes)


def live_cluster() -> tuple[Node, ...]:
    """Return the nodes of the Ray cluster that this process belongs to, sorted by address.

    Read in a separate process with a timeout: Ray waits for many minutes if a cluster refuses it.

    Raises:
        PlacementError: there is none, or it does not answer.
    """
    command = [sys.executable, "-m", LIVE_NODES_MODULE]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=LIVE_NODES_TIMEOUT_S, check=False
        )
        why = (result.stderr.strip().splitlines() or ["no answer"])[-1]
    except subprocess.TimeoutExpired:
        result, why = None, f"no answer within {LIVE_NODES_TIMEOUT_S:g} s"
    if result is None or result.returncode:
        raise PlacementError(
            f"No Ray cluster can be reached ({why}). Set RAY_ADDRESS, or describe the cluster, "
            "for example --cluster 3x8xA100-80GB"
        )
    return tuple(node_of(*entry) for entry in json.loads(result.stdout.splitlines()[-1]))


def node_of(entry: Mapping[str, Any], gpu_memory_gb: float | None = None) -> Node:
    """Return the node of an entry of ``ray.nodes()``; its GPUs' memory may be unknown."""
    return Node(
        name=entry["NodeManagerAddress"],
        gpus=int(entry["Resources"].get("GPU", 0)),
        labels=entry["Labels"],
        gpu_kind=gpu_kind(entry["Labels"].get("ray.io/accelerator-type", ""), gpu_memory_gb),
        gpu_memory_gb=gpu_memory_gb,
    )


def kind_of(node: Node) -> GpuKind | None:
    """Return the data of a node's GPUs; of an unknown kind its memory alone, None if unknown too.

    Such a kind has the speed 0.
    """
    if node.gpu_kind is not None:
        return GPU_KINDS[node.gpu_kind]
    return (
        None
        if node.gpu_memory_gb is None
        else GpuKind(node.gpu_memory_gb, 0, 0, 0, (), node.has_bf16)
    )


def gpu_kind(ray_name: str, memory_gb: float | None) -> str | None:
    """Return the kind with a name in Ray, by its memory if Ray gives several kinds that name.

    None if it is unknown.
    """
    family = [kind for kind, gpu in GPU_KINDS.items() if ray_name in gpu.ray_names]
    if memory_gb is None:
        return family[0] if len(family) == 1 else None
    return _of_size(family, memory_gb)


def _of_size(family: Iterable[str], memory_gb: float) -> str | None:
    """Return the kind whose memory is closest; None if there are no kinds."""
    return min(family, key=lambda kind: abs(GPU_KINDS[kind].memory_gb - memory_gb), default=None)


def hide_gpus(config: Config) -> None:
    """Let this process and those that it starts see no GPU where ``placement.gpus`` is 0."""
    if config.placement.gpus == 0:
        os.environ[VISIBLE] = ""


@contextmanager
def restored_gpus() -> Iterator[None]:
    """Let this process see at the end what it saw before: another run may follow."""
    before = os.environ.get(VISIBLE)
    try:
        yield
    finally:
        os.environ.pop(VISIBLE, None)
        os.environ |= {} if before is None else {VISIBLE: before}


def this_machine() -> Node:
    """Return this machine as a node; its kind of GPU is found by name and memory.

    Without PyTorch, which every stage on GPUs needs, it has none.
    """
    try:
        import torch
    except ModuleNotFoundError:
        return Node("this machine", 0)

    count = torch.cuda.device_count()
    if not count:
        return Node("this machine", 0)
    properties = torch.cuda.get_device_properties(0)
    family = [
        kind for kind in GPU_KINDS if kind.partition("-")[0] in properties.name.replace(" ", "")
    ]
    memory_gb = properties.total_memory / 1e9
    kind = _of_size(family, memory_gb)
    return Node("this machine", count, {}, kind, memory_gb, has_bf16=properties.major >= 8)


def memory_of_machine() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
