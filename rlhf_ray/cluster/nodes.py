"""One small task on every node of the cluster that Ray is connected to."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.errors import RlhfError

T = TypeVar("T")


@dataclass(frozen=True)
class ClusterNode:
    """A node that is alive."""

    name: str
    """Its address; where several have the same one, with the start of its id."""
    node_id: str
    """Ray's."""
    address: str
    """Under which other nodes reach it."""


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What a node answered, or why it did not."""

    node: ClusterNode
    value: T | None
    problem: str = ""


def alive_nodes() -> list[ClusterNode]:
    """Every node that is alive, by name."""
    entries = [entry for entry in ray.nodes() if entry["Alive"]]
    shared = Counter(entry["NodeManagerAddress"] for entry in entries)
    nodes = []
    for entry in entries:
        address, node_id = entry["NodeManagerAddress"], entry["NodeID"]
        name = address if shared[address] == 1 else f"{address} ({node_id[:8]})"
        nodes.append(ClusterNode(name, node_id, address))
    return sorted(nodes, key=lambda node: node.name)


def on_nodes(
    nodes: Sequence[ClusterNode],
    function: Callable[..., T],
    arguments: Sequence[tuple[Any, ...]],
    timeout_s: float,
) -> list[Answer[T]]:
    """Call a function once on each node, all at the same time.

    Args:
        nodes: from `alive_nodes`.
        function: a function of a module, or one that pickles.
        arguments: of each node's call.
        timeout_s: for all of them together.

    Returns:
        An answer a node, in their order; a node that is lost or late has a problem, no value.
    """
    # No CPU: the check of a full cluster must not wait for its work to end.
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    references = [
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ).remote(*args)
        for node, args in zip(nodes, arguments, strict=True)
    ]
    deadline = time.monotonic() + timeout_s
    return [
        _answer(node, reference, max(0.0, deadline - time.monotonic()), timeout_s)
        for node, reference in zip(nodes, references, strict=True)
    ]


def _answer(node: ClusterNode, reference: Any, left_s: float, timeout_s: float) -> Answer[Any]:
    try:
        return Answer(node, ray.get(reference, timeout=left_s))
    except GetTimeoutError:
        ray.cancel(reference, force=True)
        return Answer(node, None, f"did not answer within {timeout_s:g} s")
    except RayTaskError as error:
        cause = error.cause
        told = str(cause) if isinstance(cause, RlhfError) else f"{type(cause).__name__}: {cause}"
        return Answer(node, None, told)
    except RayError as error:
        return Answer(node, None, f"lost: {str(error).strip().splitlines()[0]}")
