"""The places of a layout, held on a live cluster by Ray's placement groups."""

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_ray.errors import PlacementError
from rlhf_ray.placement.bundles import Bundle, placement_groups, worker_name
from rlhf_ray.placement.hardware import node_of
from rlhf_ray.placement.layout import Demand, Node, Place, fit, lay_out, shortage

POLL_S = 1.0
"""Between two looks at what is free."""
WAIT_S = 0.01
"""Between two looks at a placement group; Ray makes one in 6 ms where there is room."""
PATIENCE_S = 5.0
"""For Ray to make all placement groups of a layout; two runs may each hold what the other needs."""
MAX_PAUSE_S = 3.0
"""Before the next try, drawn anew by each run, whatever its seed, so that one comes first."""
NODE_ID = "ray.io/node-id"


@dataclass(frozen=True)
class LiveNode:
    """A node of the cluster that this process belongs to."""

    id: str
    node: Node
    free: int
    """GPUs that nobody holds a part of."""


@dataclass(eq=False)
class _Group:
    """A placement group and those who sit in it."""

    handle: PlacementGroup
    workers: set[str]


@dataclass(frozen=True)
class Seat:
    """Where Ray is to put an actor."""

    num_gpus: float
    group: _Group
    bundle: int

    @property
    def strategy(self) -> PlacementGroupSchedulingStrategy:
        """As Ray's options want it."""
        return PlacementGroupSchedulingStrategy(self.group.handle, self.bundle)


def live_nodes() -> list[LiveNode]:
    """Nodes that are alive, by address."""
    available = ray._private.state.available_resources_per_node()  # type: ignore[attr-defined]
    return [
        LiveNode(
            id=entry["NodeID"],
            node=node_of(entry),
            free=int(available.get(entry["NodeID"], {}).get("GPU", 0)),
        )
        for entry in sorted(ray.nodes(), key=lambda e: (e["NodeManagerAddress"], e["NodeID"]))
        if entry["Alive"]
    ]


class Placement:
    """The seats of a run's workers; none where they need no GPU: there any CPU will do."""

    def __init__(
        self, timeout_s: float, *, may_grow: bool, ask: Callable[[], None] = lambda: None
    ) -> None:
        """
        Args:
            timeout_s: how long to wait for room.
            may_grow: whether nodes may join.
            ask: has them join; called again and again while there is no room.
        """
        self._timeout_s = timeout_s
        self._may_grow = may_grow
        self._ask = ask
        self._on_gpus = False
        self._seats: dict[str, Seat] = {}
        self._spare: dict[str, list[Seat]] = defaultdict(list)
        """Role -> seats left by its workers, on GPUs that others are on as well."""

    def seat(self, worker: str) -> Seat | None:
        """Where a worker is to go; None: anywhere."""
        return self._seats.get(worker)

    def resources(self, demands: Sequence[Demand]) -> list[dict[str, float]]:
        """What each worker asks Ray for."""
        return [
            {"CPU": 1.0} | ({"GPU": demand.gpus} if demand.gpus else {})
            for demand in demands
            for _ in range(demand.workers)
        ]

    def labels(self, demands: Sequence[Demand]) -> list[dict[str, str]]:
        """Labels that each worker asks of its node, not where nodes without do, as in a layout.

        Of nodes that have yet to come nobody knows their labels. The first that come tell: then
        those that are right are asked for.
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

    async def reserve(self, demands: Sequence[Demand]) -> None:
        """Hold a place for every worker.

        A machine of ours has GPUs or not; those of a cluster that was joined are waited for.

        Raises:
            PlacementError: what was asked, what the cluster has, and what would fit.
        """
        there = self._may_grow or any(live.node.gpus for live in live_nodes())
        self._on_gpus = there and any(demand.gpus for demand in demands)
        if self._on_gpus:
            await self._reserve(demands, 0)

    async def reserve_one(self, demand: Demand, rank: int) -> None:
        """Hold a place for one worker that joins, or that comes back after `release`.

        Raises:
            PlacementError: as `reserve` does.
        """
        if not self._on_gpus:
            return
        spare = self._spare[demand.role]
        if spare:
            worker, seat = f"{demand.role}-{rank}", spare.pop()
            seat.group.workers.add(worker)
            self._seats[worker] = seat
        else:
            await self._reserve([replace(demand, workers=1)], rank)

    def release(self, worker: str) -> None:
        """Give up the place of a worker that has ended.

        On a GPU with others it is kept for the next worker of its role.
        """
        seat = self._seats.pop(worker, None)
        if seat is None:
            return
        seat.group.workers.discard(worker)
        if seat.group.workers:
            self._spare[worker.rpartition("-")[0]].append(seat)
        else:
            remove_placement_group(seat.group.handle)
            for seats in self._spare.values():
                seats[:] = [spare for spare in seats if spare.group is not seat.group]

    def close(self) -> None:
        """Give up every place."""
        for worker in [*self._seats]:
            self.release(worker)
        self._spare.clear()

    async def _reserve(self, demands: Sequence[Demand], first_rank: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not await self._is_held(demands, first_rank, deadline):
            await asyncio.sleep(random.SystemRandom().uniform(0, MAX_PAUSE_S))

    async def _is_held(self, demands: Sequence[Demand], first_rank: int, deadline: float) -> bool:
        """Lay out and reserve; False: Ray could not reserve all, and nothing is held."""
        places, nodes = await self._laid_out(demands, deadline)
        moved = [replace(place, rank=place.rank + first_rank) for place in places]
        groups = [self._hold(bundles, nodes, moved) for bundles in placement_groups(moved)]
        until, is_held = min(time.monotonic() + PATIENCE_S, deadline), False
        try:
            late = [group for group in groups if not await _is_made(group, until)]
            if late and time.monotonic() >= deadline:
                raise self._not_made(late[0])
            is_held = not late
        finally:
            for place in [] if is_held else moved:
                self.release(worker_name(place))
        return is_held

    async def _laid_out(
        self, demands: Sequence[Demand], deadline: float
    ) -> tuple[list[Place], list[LiveNode]]:
        """Places on GPUs that are free, as soon as there are enough."""
        while True:
            nodes = live_nodes()
            free = [replace(live.node, gpus=live.free) for live in nodes]
            places = fit(demands, free)
            if places is not None:
                return places, nodes
            if not self._may_grow:
                lay_out(demands, [live.node for live in nodes])
            if time.monotonic() >= deadline:
                raise PlacementError(
                    f"{shortage(demands, free)}. {_in_use(nodes)}{_no_gpus(nodes)}"
                    f"Waited {self._timeout_s:g} s for room (placement.timeout_s)"
                )
            self._ask()
            await asyncio.sleep(POLL_S)

    def _hold(
        self, bundles: Sequence[Bundle], nodes: Sequence[LiveNode], places: Sequence[Place]
    ) -> _Group:
        handle = placement_group(
            [bundle.resources for bundle in bundles],
            bundle_label_selector=[{NODE_ID: nodes[bundle.node].id} for bundle in bundles],
        )
        shares = {worker_name(place): place.share for place in places}
        group = _Group(handle, {worker for bundle in bundles for worker in bundle.workers})
        for index, bundle in enumerate(bundles):
            for worker in bundle.workers:
                self._seats[worker] = Seat(shares[worker], group, index)
        return group

    def _not_made(self, group: _Group) -> PlacementError:
        bundles = list(ray.util.placement_group_table(group.handle)["bundles"].values())
        return PlacementError(
            f"Ray did not reserve places for {', '.join(sorted(group.workers))} within "
            f"{self._timeout_s:g} s (placement.timeout_s), though the GPUs were free: the nodes "
            "have too few CPUs (each worker needs one), or somebody else was faster. "
            f"Asked: {bundles}. {_in_use(live_nodes())}Try again"
        )


async def _is_made(group: _Group, until: float) -> bool:
    """Whether Ray has reserved it by then."""
    while not group.handle.wait(0):
        if time.monotonic() >= until:
            return False
        await asyncio.sleep(WAIT_S)
    return True


def _in_use(nodes: Sequence[LiveNode]) -> str:
    """GPUs that others hold, where there are any."""
    held = [
        f"{live.node.name} {live.node.gpus - live.free} of {live.node.gpus}"
        for live in nodes
        if live.free < live.node.gpus
    ]
    return f"In use by others: {', '.join(held)}. " if held else ""


def _no_gpus(nodes: Sequence[LiveNode]) -> str:
    """What to do on a cluster of CPUs."""
    if any(live.node.gpus for live in nodes):
        return ""
    return "No node has GPUs: for a cluster of CPUs set placement.gpus=0. "
