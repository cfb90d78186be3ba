"""Hold the slots of a layout on a live cluster by Ray's placement groups."""

import asyncio
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.errors import PlacementError
from rlhf_ray.placement.bundles import Bundle, placement_groups, role_of, worker_name
from rlhf_ray.placement.hardware import node_of
from rlhf_ray.placement.layout import Demand, Node, Slot, fit, lay_out, shortage

POLL_S, WAIT_S = 1.0, 0.01
"""Between two looks at the free GPUs, and at a placement group; Ray creates one in 6 ms."""
PATIENCE_S = 5.0
"""How long Ray gets to create all placement groups of a layout. Then they are given back: two runs
may each hold what the other needs."""
MAX_PAUSE_S = 3.0
"""Longest pause before the next try. It is random whatever the run's seed, so that one of two runs
that compete wins."""
MANY = 10**6
"""Ranks from here on stand for workers that are to return."""
NODE_ID = "ray.io/node-id"
Ranks = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class LiveNode:
    """A node of the cluster that this process belongs to."""

    id: str
    node: Node
    free: int
    """Number of GPUs of which nobody holds any part."""


@dataclass(eq=False)
class _Group:
    """A placement group and its workers."""

    handle: PlacementGroup
    workers: set[str]
    seats: list[tuple[str, "ReservedSlot"]] = field(default_factory=list)
    """Role and slot of all that the group was made for; workers of a role change their slots."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while slots are reserved in the place of lost ones."""


@dataclass(frozen=True)
class ReservedSlot:
    """A slot that Ray has reserved for an actor."""

    num_gpus: float
    node_id: str
    group: _Group
    bundle: int

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        """The scheduling strategy for the actor's options."""
        return PlacementGroupSchedulingStrategy(self.group.handle, self.bundle)


def draining_nodes() -> dict[str, float]:
    """Return the nodes that are about to leave the cluster, with their deadline, Unix seconds."""
    known = ray._private.state.state.get_draining_nodes()  # type: ignore[attr-defined]
    return {node: ms / 1000 if ms else math.inf for node, ms in known.items()}


def live_nodes() -> list[LiveNode]:
    """Return the living nodes that are to stay, sorted by address."""
    leaving = draining_nodes()
    # Ray's public API has the free resources of the whole cluster only, not of each node.
    available = ray._private.state.available_resources_per_node()  # type: ignore[attr-defined]
    return [
        LiveNode(
            id=entry["NodeID"],
            node=node_of(entry),
            free=int(available.get(entry["NodeID"], {}).get("GPU", 0)),
        )
        for entry in sorted(ray.nodes(), key=lambda e: (e["NodeManagerAddress"], e["NodeID"]))
        if entry["Alive"] and entry["NodeID"] not in leaving
    ]


class Placement:
    """The reserved slots of a run's workers.

    Workers have none if no role needs a GPU: then Ray may put them on any CPU.
    """

    def __init__(
        self, timeout_s: float, *, may_grow: bool, request_nodes: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            timeout_s: longest wait for free GPUs.
            may_grow: whether the cluster may get more nodes than it has.
            request_nodes: called at intervals while GPUs are missing.
        """
        self._timeout_s = timeout_s
        self._may_grow = may_grow
        self._request_nodes = request_nodes
        self._on_gpus = False
        self._slots: dict[str, ReservedSlot] = {}
        self._spare: dict[str, list[ReservedSlot]] = defaultdict(list)
        """Role -> slots that its workers left, on GPUs that others still use."""
        self._demands: dict[str, Demand] = {}
        self._former: dict[str, _Group] = {}
        """Worker -> the group of the slot that it has or had last."""

    def slot(self, worker: str) -> ReservedSlot | None:
        """Return the slot of a worker; None: Ray may put it anywhere."""
        return self._slots.get(worker)

    def resources(self, demands: Sequence[Demand]) -> list[dict[str, float]]:
        """Return the resources that each worker requests from Ray."""
        return [
            {"CPU": 1.0} | ({"GPU": demand.gpus} if demand.gpus else {})
            for demand in demands
            for _ in range(demand.workers)
        ]

    def labels(self, demands: Sequence[Demand]) -> list[dict[str, str]]:
        """Return the labels that each worker requests of its node, by the same rule as a layout.

        The labels of nodes that have not joined yet are unknown. Those of the first nodes to join
        show which labels exist, and then those are requested.
        """
        needs_gpus = any(demand.gpus for demand in demands)
        nodes = [live.node for live in live_nodes() if live.node.gpus] if needs_gpus else []
        carried = {label for node in nodes for label in node.labels.items()}
        on_all = set[str].intersection(*(set(node.labels) for node in nodes)) if nodes else set()
        return [
            {
                key: value
                for key, value in demand.labels.items()
                if (key, value) in carried or key in on_all
            }
            for demand in demands
            for _ in range(demand.workers)
        ]

    async def await_capacity(self, demands: Sequence[Demand]) -> None:
        """Wait until the nodes have GPUs for all workers, in use or not.

        Raises:
            PlacementError: see `reserve`.
        """
        if self._needs_gpus(demands):
            deadline = time.monotonic() + self._timeout_s
            await self._lay_out(demands, deadline, lambda live: live.node.gpus)

    def _needs_gpus(self, demands: Sequence[Demand]) -> bool:
        may_have_gpus = self._may_grow or any(live.node.gpus for live in live_nodes())
        return may_have_gpus and any(demand.gpus for demand in demands)

    async def reserve(self, demands: Sequence[Demand]) -> None:
        """Reserve a slot for every worker.

        On one machine without GPUs nothing is reserved; a cluster's GPUs are waited for.

        Raises:
            PlacementError: says what is requested, what the cluster has, and what would fit.
        """
        self._on_gpus = self._needs_gpus(demands)
        self._demands = {demand.role: demand for demand in demands}
        if self._on_gpus:
            deadline = time.monotonic() + self._timeout_s
            await self._reserve(demands, {d.role: range(d.workers) for d in demands}, deadline)

    async def reserve_again(self, demand: Demand, ranks: Sequence[int]) -> None:
        """Reserve slots for workers of a role that join, or that return after `release`."""
        if not self._on_gpus:
            return
        # Also while another holds the lock, who may wait for nodes that come late, or never.
        missing = self._take_spare(demand.role, ranks)
        deadline = time.monotonic() + self._timeout_s  # whoever waited for the lock has waited
        known = (self._former.get(f"{demand.role}-{rank}") for rank in missing)
        former = next(filter(None, known), None)
        async with former.lock if former else nullcontext():
            if missing := self._take_spare(demand.role, missing):
                await self._reserve_with_lost(demand, missing, former, deadline)

    def _take_spare(self, role: str, ranks: Sequence[int]) -> list[int]:
        """Have workers without a slot on a node that stays take spare ones; return the others."""
        names = {f"{role}-{rank}": rank for rank in ranks}
        for name in names:
            if name in self._slots and not _on_live_nodes([self._slots[name]]):
                self.release(name)
        spare = self._spare[role]
        spare[:] = _on_live_nodes(spare)
        missing = [name for name in names if name not in self._slots]
        for name in missing[: len(spare)]:
            self._slots[name] = slot = spare.pop()
            slot.group.workers.add(name)
            self._former[name] = slot.group
        return [rank for name, rank in names.items() if name not in self._slots]

    async def _reserve_with_lost(
        self, demand: Demand, ranks: Sequence[int], former: _Group | None, deadline: float
    ) -> None:
        """Reserve slots, and with them all others of their former group that went with a node.

        Together they fit on as few GPUs as before. The others are spare until their workers return.
        """
        seats = former.seats if former else []
        alive = _on_live_nodes(slot for _, slot in seats)
        lost = [seat for seat in seats if seat[1] not in alive]
        others = Counter(role for role, _ in lost) - Counter({demand.role: len(ranks)})
        placeholders = {role: range(MANY, MANY + count) for role, count in others.items()}
        asked = {**placeholders, demand.role: [*ranks, *placeholders.get(demand.role, ())]}
        known = {**self._demands, demand.role: demand}
        demands = [replace(known[role], workers=len(numbers)) for role, numbers in asked.items()]
        await self._reserve(demands, asked, deadline)
        seats[:] = [seat for seat in seats if seat not in lost]
        for role, numbers in placeholders.items():
            for number in numbers:
                self.release(f"{role}-{number}")

    def release(self, worker: str) -> None:
        """Give up the slot of a worker that has ended.

        A slot on a GPU that others still use is kept for the next worker of its role: Ray can only
        give back whole placement groups.
        """
        slot = self._slots.pop(worker, None)
        if slot is None:
            return
        slot.group.workers.discard(worker)
        if slot.group.workers and _on_live_nodes([slot]):
            self._spare[role_of(worker)].append(slot)
        elif not slot.group.workers:
            remove_placement_group(slot.group.handle)
            for slots in self._spare.values():
                slots[:] = [spare for spare in slots if spare.group is not slot.group]

    def close(self) -> None:
        """Give up all slots."""
        for worker in [*self._slots]:
            self.release(worker)
        self._spare.clear()

    async def _reserve(self, demands: Sequence[Demand], ranks: Ranks, deadline: float) -> None:
        while not await self._try_reserve(demands, ranks, deadline):
            await asyncio.sleep(random.SystemRandom().uniform(0, MAX_PAUSE_S))

    async def _try_reserve(self, demands: Sequence[Demand], ranks: Ranks, deadline: float) -> bool:
        """Lay out and reserve; return False, and hold nothing, if Ray could not reserve all."""
        layout, nodes = await self._lay_out(demands, deadline, lambda live: live.free)
        slots = [replace(slot, rank=ranks[slot.role][slot.rank]) for slot in layout]
        groups = [self._create(bundles, nodes, slots) for bundles in placement_groups(slots)]
        until, is_reserved = min(time.monotonic() + PATIENCE_S, deadline), False
        try:
            missing = [group for group in groups if not await _is_created(group, until)]
            if missing and time.monotonic() >= deadline:
                raise self._not_created(missing[0])
            is_reserved = not missing
        finally:
            for slot in [] if is_reserved else slots:
                self.release(worker_name(slot))
        # Not before: until then the former group tells what is lost.
        self._former |= {worker: group for group in groups for worker in group.workers}
        return is_reserved

    async def _lay_out(
        self, demands: Sequence[Demand], deadline: float, usable: Callable[[LiveNode], int]
    ) -> tuple[list[Slot], list[LiveNode]]:
        """Return slots as soon as there are enough GPUs, of which each node has ``usable``."""
        while True:
            nodes = live_nodes()
            free = [replace(live.node, gpus=usable(live)) for live in nodes]
            slots = fit(demands, free)
            if slots is not None:
                return slots, nodes
            if not self._may_grow:
                # Raises if the demands do not fit even once others have given up their GPUs.
                lay_out(demands, [live.node for live in nodes])
            if time.monotonic() >= deadline:
                raise PlacementError(
                    f"{shortage(demands, free)}. {_in_use(nodes)}{_no_gpus(nodes)}"
                    f"Waited {self._timeout_s:g} s for free GPUs (placement.timeout_s)"
                )
            self._request_nodes()
            await asyncio.sleep(POLL_S)

    def _create(
        self, bundles: Sequence[Bundle], nodes: Sequence[LiveNode], slots: Sequence[Slot]
    ) -> _Group:
        handle = placement_group(
            [bundle.resources for bundle in bundles],
            bundle_label_selector=[{NODE_ID: nodes[bundle.node].id} for bundle in bundles],
        )
        reserved_for = {worker_name(slot): slot for slot in slots}
        group = _Group(handle, {worker for bundle in bundles for worker in bundle.workers})
        for index, bundle in enumerate(bundles):
            for worker in bundle.workers:
                slot, node_id = reserved_for[worker], nodes[bundle.node].id
                self._slots[worker] = ReservedSlot(slot.share, node_id, group, index)
                group.seats.append((slot.role, self._slots[worker]))
        return group

    def _not_created(self, group: _Group) -> PlacementError:
        bundles = list(ray.util.placement_group_table(group.handle)["bundles"].values())
        return PlacementError(
            f"Ray did not reserve slots for {', '.join(sorted(group.workers))} within "
            f"{self._timeout_s:g} s (placement.timeout_s), though the GPUs were free: the nodes "
            "have too few CPUs (each worker needs one), or another run took the GPUs first. "
            f"Requested: {bundles}. {_in_use(live_nodes())}Add CPUs, or try again"
        )


def _on_live_nodes(slots: Iterable[ReservedSlot]) -> list[ReservedSlot]:
    alive = {live.id for live in live_nodes()}
    return [slot for slot in slots if slot.node_id in alive]


async def _is_created(group: _Group, until: float) -> bool:
    """Wait until Ray has reserved a group; return False at the deadline."""
    while not group.handle.wait(0):
        if time.monotonic() >= until:
            return False
        await asyncio.sleep(WAIT_S)
    return True


def _in_use(nodes: Sequence[LiveNode]) -> str:
    """Say how many GPUs others hold, if any."""
    in_use = [
        f"{live.node.name} {live.node.gpus - live.free} of {live.node.gpus}"
        for live in nodes
        if live.free < live.node.gpus
    ]
    return f"In use by others: {', '.join(in_use)}. " if in_use else ""


def _no_gpus(nodes: Sequence[LiveNode]) -> str:
    """Say what to set on a cluster without GPUs."""
    if any(live.node.gpus for live in nodes):
        return ""
    return "No node has GPUs; for a cluster without GPUs set placement.gpus=0. "
