"""Who is given which seat, over placement groups that are only made believe."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from rlhf_ray.cluster import placement
from rlhf_ray.cluster.layout import Demand, Node
from rlhf_ray.cluster.placement import LiveNode, Placement
from rlhf_ray.errors import PlacementError

GENERATORS = Demand("generator", 2, 0.5, sharers=frozenset({"generator"}))


class Group:
    """A placement group that is reserved at once."""

    def __init__(self, bundles: Sequence[Any]) -> None:
        self.bundles = bundles

    def wait(self, timeout_s: float) -> bool:
        return True


class Cluster:
    """Nodes, and the placement groups on them."""

    def __init__(self, *nodes: Node) -> None:
        self.nodes = list(nodes)
        self.groups: list[Any] = []
        self.removed: list[Any] = []
        self.kind: type = Group

    def live(self) -> list[LiveNode]:
        held = sum(b.get("GPU", 0) for group in self.groups for b in group.bundles)
        return [LiveNode(n.name, n, int(n.gpus - held)) for n in self.nodes]

    def make(self, bundles: Sequence[Any], **_: Any) -> Any:
        self.groups.append(self.kind(bundles))
        return self.groups[-1]

    def remove(self, group: Any) -> None:
        self.groups.remove(group)
        self.removed.append(group)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """One node of two GPUs."""
    made = Cluster(Node("n", 2))
    monkeypatch.setattr(placement, "live_nodes", made.live)
    monkeypatch.setattr(placement, "placement_group", made.make)
    monkeypatch.setattr(placement, "remove_placement_group", made.remove)
    monkeypatch.setattr(placement, "POLL_S", 0.001)
    return made


async def test_a_seat_goes_with_its_group(cluster: Cluster) -> None:
    """Two that shared a GPU leave; who comes then sits in a group that is there."""
    held = Placement(1.0, may_grow=True)
    await held.reserve([GENERATORS])
    held.release("generator-1")
    held.release("generator-0")
    assert not cluster.groups
    await held.reserve_one(GENERATORS, 2)
    seat = held.seat("generator-2")
    assert seat is not None
    assert seat.group.handle in cluster.groups


async def test_a_seat_left_beside_others_is_for_the_next_of_its_role(cluster: Cluster) -> None:
    held = Placement(1.0, may_grow=True)
    await held.reserve([GENERATORS])
    left = held.seat("generator-1")
    held.release("generator-1")
    await held.reserve_one(GENERATORS, 2)
    assert held.seat("generator-2") is left
    assert len(cluster.groups) == 1


async def test_gpu_nodes_that_have_yet_to_join_are_waited_for(cluster: Cluster) -> None:
    """A cluster whose head alone is up is no cluster of CPUs."""
    (gpu_node,) = cluster.nodes
    cluster.nodes = [Node("head", 0)]
    held = Placement(5.0, may_grow=True)
    reserving = asyncio.create_task(held.reserve([GENERATORS]))
    await asyncio.sleep(0.02)
    assert not reserving.done()
    cluster.nodes.append(gpu_node)
    await reserving
    assert held.seat("generator-1") is not None


async def test_a_joined_cluster_without_gpus_is_told_how_to_do_without(cluster: Cluster) -> None:
    cluster.nodes = [Node("head", 0)]
    with pytest.raises(PlacementError) as error:
        await Placement(0.01, may_grow=True).reserve([GENERATORS])
    for part in ("generator 2 x 0.5", "No node has GPUs", "set placement.gpus=0", "timeout_s"):
        assert part in str(error.value)


@pytest.mark.parametrize(("gpus", "may_grow"), [(0, True), (0.5, False)])
async def test_any_cpu_will_do(cluster: Cluster, gpus: float, may_grow: bool) -> None:
    """Where GPUs are not asked for, and on a machine of the run's own that has none."""
    cluster.nodes = [Node("head", 0)]
    held, asked = Placement(0.01, may_grow=may_grow), replace(GENERATORS, gpus=gpus)
    await held.reserve([asked])
    cluster.nodes.append(Node("late", 2))
    await held.reserve_one(asked, 2)
    assert held.seat("generator-0") is held.seat("generator-2") is None


def test_labels_are_asked_for_that_some_node_carries(cluster: Cluster) -> None:
    cluster.nodes = [Node("n", 2, {"role": "train", "zone": "a"})]
    asked = [Demand("policy", 2, 1, {"role": "train"}), Demand("reward", 1, 0, {"role": "x"})]
    held = Placement(1.0, may_grow=True)
    assert held.labels(asked) == [{"role": "train"}, {"role": "train"}, {}]
    on_cpus = [replace(demand, gpus=0) for demand in asked]
    assert held.labels(on_cpus) == [{}, {}, {}], "any CPU will do"
