"""Who sits on which GPU: pure arithmetic on a config and the shapes of nodes, without Ray."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Node:
    """One machine of a cluster."""

    name: str
    """What people call it: its address in a live cluster, ``node-0`` in a planned one."""
    gpus: int
    labels: Mapping[str, str] = field(default_factory=dict)
    """Ray's node labels, e.g. ``{"role": "rollout"}``."""
    gpu_kind: str | None = None
    """A name of `cluster.hardware`, such as ``A100-80GB``; None: not known."""


@dataclass(frozen=True)
class Demand:
    """What the workers of one role need."""

    role: str
    """``policy``, ``critic``, ``reference``, ``reward`` or ``generator``."""
    workers: int
    gpus: float
    """Of one worker: a part of one that is shared, or a whole number of one node."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that its nodes must carry, where any node of the cluster carries them."""
    is_group: bool = False
    """Whether its workers talk to each other all the time: packed on as few nodes as can be, ranks
    of a node in order."""


@dataclass(frozen=True)
class Place:
    """Where one worker sits."""

    role: str
    rank: int
    node: int
    """Index of the node."""
    gpus: tuple[int, ...]
    """Indices of its GPUs on that node; empty: it needs none."""
    share: float
    """GPUs that it holds: their number, or a part of one."""
