"""What clusters are made of: kinds of GPUs, and nodes as they are written or found."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.placement.layout import Node

ASKS_RAY = "rlhf_ray.doctor.live_nodes"
ASK_TIMEOUT_S = 45.0


@dataclass(frozen=True)
class GpuKind:
    """One GPU. GB are 10^9 bytes."""

    memory_gb: float
    """As the driver reports it: the number in the name is rounded, and in GiB for some."""
    bf16_tflops: float
    """Of the tensor cores, dense; of a kind without bf16, in fp16."""
    memory_gb_per_s: float
    """Bandwidth of its own memory."""
    link_gb_per_s: float
    """To another GPU of the node, one way: NVLink, or PCIe where there is none."""
    ray_names: tuple[str, ...]
    """What Ray calls it: by the driver's name, without its size, unless people label nodes
    themselves (``ray.util.accelerators``)."""


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
    "V100-16GB": GpuKind(17.2, 125, 900, 150, ("V100",)),
    "V100-32GB": GpuKind(34.4, 125, 900, 150, ("V100",)),
    "T4-16GB": GpuKind(16.1, 65, 320, 16, ("T4",)),
    "RTX4090-24GB": GpuKind(25.8, 165, 1008, 32, ("GeForce-RTX-4090",)),
}
"""Makers' data sheets: NVIDIA A100 (2021), H100 and H200 (SXM), B200 (HGX), L40S, L4, V100 (SXM2),
T4, RTX A6000; the A10G's are its A10's, at the clock that AWS gives it; RTX 4090: Ada whitepaper,
with fp32 accumulation. Memory is what nvidia-smi shows."""

NETWORK_GB_PER_S = 12.5
"""Between nodes: 100 Gbit/s, the least that makers' training nodes come with."""

_GROUP = re.compile(r"(?:(\d+)x)?(\d+)x([A-Za-z].*)")


def parse_cluster(text: str) -> tuple[Node, ...]:
    """Nodes as people write them.

    Args:
        text: ``3x8xA100-80GB`` (nodes x GPUs x kind), ``8xH100-80GB`` (one node); with ``+``
            between groups of nodes that differ.

    Raises:
        ConfigError: it is not written so, or names a kind that is not known.
    """
    nodes: list[Node] = []
    for group in text.split("+"):
        found = _GROUP.fullmatch(group.strip())
        if found is None or "0" in (found[1], found[2]):
            raise ConfigError(
                f"--cluster {text}: {group!r} is not NODESxGPUSxKIND; write for example "
                "3x8xA100-80GB, or 8xA100-80GB+2x4xL40S-48GB for unlike nodes, or live"
            )
        if found[3] not in GPU_KINDS:
            raise ConfigError(
                f"--cluster {text}: {found[3]!r} is no known kind of GPU; known are "
                f"{', '.join(GPU_KINDS)}"
            )
        nodes += [
            Node(f"node-{len(nodes) + number}", int(found[2]), gpu_kind=found[3])
            for number in range(int(found[1] or 1))
        ]
    return tuple(nodes)


def live_cluster() -> tuple[Node, ...]:
    """The nodes of the Ray cluster that this process belongs to, by their addresses.

    Asked in a process of its own: Ray waits very long for a cluster that does not let it in.

    Raises:
        PlacementError: there is none, or it does not answer.
    """
    command = [sys.executable, "-m", ASKS_RAY]
    try:
        asked = subprocess.run(
            command, capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False
        )
        why = (asked.stderr.strip().splitlines() or ["no answer"])[-1]
    except subprocess.TimeoutExpired:
        asked, why = None, f"no answer within {ASK_TIMEOUT_S:g} s"
    if asked is None or asked.returncode:
        raise PlacementError(
            f"No Ray cluster can be reached ({why}); say what it would be, for example "
            "--cluster 3x8xA100-80GB"
        )
    return tuple(node_of(*found) for found in json.loads(asked.stdout.splitlines()[-1]))


def node_of(entry: Mapping[str, Any], gpu_memory_gb: float | None = None) -> Node:
    """A node as ``ray.nodes()`` describes it.

    Args:
        entry: Ray's.
        gpu_memory_gb: of each of its GPUs; None: not known.
    """
    return Node(
        name=entry["NodeManagerAddress"],
        gpus=int(entry["Resources"].get("GPU", 0)),
        labels=entry["Labels"],
        gpu_kind=kind_called(entry["Labels"].get("ray.io/accelerator-type", ""), gpu_memory_gb),
    )


def kind_called(ray_name: str, memory_gb: float | None) -> str | None:
    """The kind that Ray calls so, of kinds that it calls alike by its memory; None: not known."""
    family = [kind for kind, gpu in GPU_KINDS.items() if ray_name in gpu.ray_names]
    if memory_gb is None:
        return family[0] if len(family) == 1 else None
    return _of_size(family, memory_gb)


def _of_size(family: Iterable[str], memory_gb: float) -> str | None:
    """Of some kinds the one with about so much memory; None: there are none."""
    return min(family, key=lambda kind: abs(GPU_KINDS[kind].memory_gb - memory_gb), default=None)


def this_machine() -> Node:
    """The machine of this process, its GPUs told apart by their memory."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return Node("this machine", 0)
    found = torch.cuda.get_device_properties(0)
    family = [kind for kind in GPU_KINDS if kind.partition("-")[0] in found.name.replace(" ", "")]
    return Node("this machine", count, gpu_kind=_of_size(family, found.total_memory / 1e9))


def memory_of_machine() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
