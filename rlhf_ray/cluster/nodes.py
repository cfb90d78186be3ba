"""The nodes of the cluster that Ray is connected to: a function call on each, requests for more."""

import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, TypeVar

import ray
from ray.autoscaler.sdk import request_resources
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.errors import RlhfError
from rlhf_ray.stacks import stacks_of

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

MOST_AT_ONCE = 32
"""Most calls of `map_in_order` at a time: one process feeds them and takes what they return."""


@dataclass(frozen=True)
class ClusterNode:
    """A living node."""

    name: str
    """Its address, followed by the start of its id if several nodes have the same address."""
    node_id: str
    """Ray's node id."""
    address: str
    """The address under which other nodes reach it."""
    entry: Mapping[str, Any] = field(default_factory=dict[str, Any], compare=False)
    """Ray's own description."""


@dataclass(frozen=True)
class Answer(Generic[T]):
    """The answer of a node, or the reason why there is none."""

    node: ClusterNode
    value: T | None
    problem: str = ""


def alive_nodes() -> list[ClusterNode]:
    """Return every living node, sorted by name."""
    entries = [entry for entry in ray.nodes() if entry["Alive"]]
    # Several nodes have one address where a cluster is simulated on one machine.
    counts = Counter(entry["NodeManagerAddress"] for entry in entries)
    nodes = []
    for entry in entries:
        address, node_id = entry["NodeManagerAddress"], entry["NodeID"]
        name = address if counts[address] == 1 else f"{address} ({node_id[:8]})"
        nodes.append(ClusterNode(name, node_id, address, entry))
    return sorted(nodes, key=lambda node: node.name)


def on_nodes(
    nodes: Sequence[ClusterNode],
    function: Callable[..., T],
    arguments: Sequence[tuple[object, ...]],
    timeout_s: float,
) -> list[Answer[T]]:
    """Call a function once on each node, on all at the same time.

    Returns:
        An answer per node, in their order; that of a lost or late node has no value, but a problem.
    """
    # No CPU: a check of a fully occupied cluster must not wait for its work to end.
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


def map_in_order(
    function: Callable[[S, T], R], shared: S, items: Iterable[T], timeout_s: float
) -> Iterator[R]:
    """Yield ``function(shared, item)`` of each item, in order, computed on all cores of all nodes.

    Items are taken ahead, as many as there are cores; what is begun is cancelled where the rest is
    not wanted.

    Raises:
        RlhfError: what the function raised.
        RayError: a call failed otherwise, or took longer than ``timeout_s``.
    """
    # No CPU: processes that wait for their work have them all.
    task = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(function)
    num_at_once = min(MOST_AT_ONCE, num_cores())
    given, rest = ray.put(shared), iter(items)
    under_way: deque[ray.ObjectRef[R]] = deque()
    try:
        while True:
            for item in islice(rest, num_at_once - len(under_way)):
                under_way.append(task.remote(given, item))
            if not under_way:
                return
            yield _value(under_way.popleft(), timeout_s)
    finally:
        for reference in under_way:
            ray.cancel(reference)


def _value(reference: "ray.ObjectRef[R]", timeout_s: float) -> R:
    try:
        return ray.get(reference, timeout=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, RlhfError):
            raise error.cause from error
        raise


def num_cores() -> int:
    """Return the cores of all nodes; a single one may declare more than its machine has."""
    nodes = alive_nodes()
    if len(nodes) == 1:
        return os.cpu_count() or 1
    return int(sum(node.entry["Resources"].get("CPU", 0) for node in nodes))


def actor_stacks(timeout_s: float) -> dict[str, str]:
    """Return the stacks of every living actor of this job, by name, each read on its node."""
    job = ray.get_runtime_context().get_job_id()
    names: dict[str, dict[int, str]] = defaultdict(dict)
    for actor in ray._private.state.actors().values():  # type: ignore[attr-defined]
        if actor["JobID"] == job and actor["State"] != "DEAD" and actor["Pid"]:
            names[actor["Address"]["NodeID"]][actor["Pid"]] = actor["Name"] or actor["ActorID"]
    nodes = [node for node in alive_nodes() if node.node_id in names]
    answers = on_nodes(nodes, stacks_of, [(list(names[n.node_id]),) for n in nodes], timeout_s)
    return {
        name: answer.value[pid] if answer.value else f"Its node {answer.problem}\n"
        for answer in answers
        for pid, name in names[answer.node.node_id].items()
    }


def request_capacity(
    bundles: Sequence[Mapping[str, float]], labels: Sequence[Mapping[str, str]]
) -> None:
    """Have Ray's autoscaler, where there is one, keep nodes on which all bundles fit at once.

    It counts running actors as part of them. A request replaces the one before, whichever job of
    the cluster made it. Without bundles no nodes are kept.
    """
    request_resources(
        bundles=[dict(bundle) for bundle in bundles],
        bundle_label_selectors=[dict(selector) for selector in labels],
    )


def _answer(
    node: ClusterNode, reference: "ray.ObjectRef[T]", left_s: float, timeout_s: float
) -> Answer[T]:
    try:
        return Answer(node, ray.get(reference, timeout=left_s))
    except GetTimeoutError:
        ray.cancel(reference, force=True)
        return Answer(node, None, f"did not answer within {timeout_s:g} s")
    except RayTaskError as error:
        cause = error.cause
        is_ours = isinstance(cause, RlhfError)
        return Answer(node, None, str(cause) if is_ours else f"{type(cause).__name__}: {cause}")
    except RayError as error:
        return Answer(node, None, f"lost: {str(error).strip().splitlines()[0]}")
