"""The slots that roles get, over fake placement groups."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.errors import PlacementError
from rlhf_ray.placement import groups as placement
from rlhf_ray.placement.groups import LiveNode, Placement
from rlhf_ray.placement.layout import Demand, Node

GENERATORS = Demand("generator", 2, 0.5, sharers=frozenset({"generator"}))


class Group:
    """A placement group that is reserved at once."""

    def __init__(self, bundles: Sequence[Any], selectors: Sequence[Any]) -> None:
        self.bundles = bundles
        self.nodes = [selector[placement.NODE_ID] for selector in selectors]

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
        held: Counter[str] = Counter()
        for group in self.groups:
            for bundle, node in zip(group.bundles, group.nodes, strict=True):
                held[node] += bundle.get("GPU", 0)
        return [LiveNode(n.name, n, int(n.gpus - held[n.name])) for n in self.nodes]

    def make(self, bundles: Sequence[Any], bundle_label_selector: Sequence[Any]) -> Any:
        self.groups.append(self.kind(bundles, bundle_label_selector))
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


async def test_a_slot_is_released_with_its_placement_group(cluster: Cluster) -> None:
    """Two roles that shared a GPU leave; the next one gets a slot in a group that exists."""
    held = Placement(1.0, may_grow=True)
    await held.reserve([GENERATORS])
    held.release("generator-1")
    held.release("generator-0")
    assert not cluster.groups
    await held.reserve_again(GENERATORS, [2])
    slot = held.slot("generator-2")
    assert slot is not None
    assert slot.group.handle in cluster.groups


async def test_a_slot_beside_others_is_kept_for_the_next_worker_of_its_role(
    cluster: Cluster,
) -> None:
    held = Placement(1.0, may_grow=True)
    await held.reserve([GENERATORS])
    left = held.slot("generator-1")
    held.release("generator-1")
    await held.reserve_again(GENERATORS, [2])
    assert held.slot("generator-2") is left
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
    assert held.slot("generator-1") is not None


async def test_on_a_cluster_without_gpus_the_error_says_what_to_set(cluster: Cluster) -> None:
    cluster.nodes = [Node("head", 0)]
    with pytest.raises(PlacementError) as error:
        await Placement(0.01, may_grow=True).reserve([GENERATORS])
    for part in ("generator 2 x 0.5", "No node has GPUs", "set placement.gpus=0", "timeout_s"):
        assert part in str(error.value)


@pytest.mark.parametrize(("gpus", "may_grow"), [(0, True), (0.5, False)])
async def test_roles_without_gpus_reserve_nothing(
    cluster: Cluster, gpus: float, may_grow: bool
) -> None:
    """Nothing is reserved without a request for GPUs, or on a run's own machine without GPUs."""
    cluster.nodes = [Node("head", 0)]
    held, asked = Placement(0.01, may_grow=may_grow), replace(GENERATORS, gpus=gpus)
    await held.reserve([asked])
    cluster.nodes.append(Node("late", 2))
    await held.reserve_again(asked, [2])
    assert held.slot("generator-0") is held.slot("generator-2") is None


def test_a_label_is_requested_if_some_node_has_it(cluster: Cluster) -> None:
    cluster.nodes = [Node("n", 2, {"role": "train", "zone": "a"})]
    asked = [Demand("policy", 2, 1, {"role": "train"}), Demand("reward", 1, 0, {"disk": "fast"})]
    held = Placement(1.0, may_grow=True)
    assert held.labels(asked) == [{"role": "train"}, {"role": "train"}, {}]
    assert held.labels([Demand("generator", 1, 1, {"role": "rollout"})]) == [{"role": "rollout"}]
    on_cpus = [replace(demand, gpus=0) for demand in asked]
    assert held.labels(on_cpus) == [{}, {}, {}], "any CPU will do"


class Contested(Group):
    """A cluster where another run's group blocks ours until ours are released once."""

    in_the_way = True

    def wait(self, timeout_s: float) -> bool:
        return not Contested.in_the_way


TWO_GROUPS = Demand("generator", 2, 1)


async def test_two_runs_do_not_wait_for_each_other(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout that cannot be reserved whole is released, and made again on what is free then."""
    monkeypatch.setattr(placement, "PATIENCE_S", 0.01)
    monkeypatch.setattr(placement, "MAX_PAUSE_S", 0.0)
    remove = cluster.remove

    def step_aside(group: Any) -> None:
        remove(group)
        if not cluster.groups:  # the other run has had its turn, on a node that is full now
            Contested.in_the_way = False
            cluster.nodes = [Node("m", 2)]

    monkeypatch.setattr(Contested, "in_the_way", True)
    monkeypatch.setattr(placement, "remove_placement_group", step_aside)
    cluster.kind = Contested
    held = Placement(5.0, may_grow=True)
    await held.reserve([TWO_GROUPS])
    assert len(cluster.removed) == len(cluster.groups) == 2
    assert {group.nodes[0] for group in cluster.groups} == {"m"}
    slots = [held.slot(f"generator-{rank}") for rank in range(2)]
    assert {slot.group.handle for slot in slots if slot} == set(cluster.groups)


async def test_slots_that_ray_does_not_reserve_are_reported_and_given_up(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes have enough GPUs and too few CPUs."""
    monkeypatch.setattr(Contested, "in_the_way", True)
    monkeypatch.setattr(
        placement.ray.util, "placement_group_table", lambda _: {"bundles": {0: "x"}}
    )
    cluster.kind = Contested
    held = Placement(0.01, may_grow=True)
    with pytest.raises(PlacementError, match=r"for generator-0 within 0.01 s.* Requested: \['x'\]"):
        await held.reserve([TWO_GROUPS])
    assert cluster.groups == []
    assert held.slot("generator-0") is None


CRITIC = Demand("critic", 2, 0.5, is_group=True)
REWARD = Demand("reward", 2, 0.5)


@pytest.mark.parametrize("critic_is_first", [True, False])
async def test_what_shared_gpus_of_a_lost_node_shares_those_of_another(
    cluster: Cluster, critic_is_first: bool
) -> None:
    """Each role is placed again when its own failure is seen; two GPUs do for both."""
    held = Placement(1.0, may_grow=True)
    await held.reserve([CRITIC, REWARD])
    assert len(cluster.groups) == 1
    cluster.nodes = [Node("m", 2)]

    async def again(demand: Demand, ranks: Sequence[int]) -> None:
        for rank in ranks:
            held.release(f"{demand.role}-{rank}")
        await held.reserve_again(demand, ranks)

    returns = [again(CRITIC, [0, 1]), again(REWARD, [1]), again(REWARD, [0])]
    await asyncio.gather(*(returns if critic_is_first else returns[::-1]))
    slots = {name: held.slot(name) for name in ("critic-0", "critic-1", "reward-0", "reward-1")}
    assert {slot.node_id for slot in slots.values() if slot} == {"m"}
    assert all(slots.values())
    ((group,), removed) = cluster.groups, cluster.removed
    assert len(group.bundles) == 2
    assert len(removed) == 1, "the group of the lost node is given back"
    for name in slots:
        held.release(name)
    assert not cluster.groups


async def test_a_slot_of_a_lost_node_is_not_kept(cluster: Cluster) -> None:
    held = Placement(1.0, may_grow=True)
    cluster.nodes = [Node("n", 1), Node("m", 1)]
    await held.reserve([CRITIC, replace(REWARD, workers=1)])
    shared = next(rank for rank in range(2) if _node(held, f"critic-{rank}") == "n")
    cluster.nodes = [Node("o", 2), Node("m", 1)]
    held.release(f"critic-{shared}")
    await held.reserve_again(CRITIC, [shared])
    assert _node(held, f"critic-{shared}") == "o"


def _node(held: Placement, worker: str) -> str | None:
    slot = held.slot(worker)
    return slot.node_id if slot else None


async def test_the_second_lost_node_takes_no_more_slots_than_the_first(cluster: Cluster) -> None:
    """Slots that were spare for a worker until it returned are its own then."""
    held = Placement(1.0, may_grow=True)
    await held.reserve([CRITIC, REWARD])
    for node, ranks in (("m", (1, 0)), ("o", (0, 1)), ("p", (1, 0))):
        cluster.nodes = [Node(node, 8)]
        for demand in (REWARD, CRITIC):
            for rank in ranks:
                held.release(f"{demand.role}-{rank}")
                await held.reserve_again(demand, [rank])
        assert cluster.live()[0].free == 6, f"two GPUs of {node} do"


async def test_a_spare_slot_is_taken_while_others_wait_for_a_node(cluster: Cluster) -> None:
    held = Placement(60.0, may_grow=True)
    cluster.nodes = [Node("n", 1), Node("m", 1)]
    await held.reserve([CRITIC, REWARD])
    lost, alive = sorted(range(2), key=lambda rank: _node(held, f"reward-{rank}") == "m")
    cluster.nodes = [Node("m", 1)]
    held.release(f"reward-{lost}")
    waiting = asyncio.ensure_future(held.reserve_again(REWARD, [lost]))
    await asyncio.sleep(0.01)
    held.release(f"reward-{alive}")
    await asyncio.wait_for(held.reserve_again(REWARD, [alive]), 5)
    assert _node(held, f"reward-{alive}") == "m"
    cluster.nodes.append(Node("o", 1))
    await asyncio.wait_for(waiting, 5)
    assert _node(held, f"reward-{lost}") == "o"


async def test_whoever_waits_for_a_node_behind_others_waits_no_longer_than_they(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a lost node of eight workers would be waited for eight times as long."""
    now = 0.0

    def poll() -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr(placement, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(placement, "POLL_S", 0.0)
    held = Placement(300.0, may_grow=True, request_nodes=poll)
    await held.reserve([CRITIC, REWARD])
    cluster.nodes = []
    for rank in range(2):
        held.release(f"reward-{rank}")
    ends = await asyncio.gather(
        *(held.reserve_again(REWARD, [rank]) for rank in range(2)), return_exceptions=True
    )
    assert [type(end) for end in ends] == [PlacementError] * 2
    assert 300 <= now < 310


async def test_a_slot_whose_node_dies_or_drains_after_it_was_reserved_is_no_slot(
    cluster: Cluster,
) -> None:
    """A worker whose start has failed before there was a process holds it still."""
    held = Placement(1.0, may_grow=True)
    cluster.nodes = [Node("n", 2), Node("m", 2)]
    await held.reserve([CRITIC, REWARD])
    former = {_node(held, f"reward-{rank}") for rank in range(2)}
    (other,) = {"n", "m"} - former
    cluster.nodes = [Node(other, 2)]
    await held.reserve_again(REWARD, [0, 1])
    assert {_node(held, f"reward-{rank}") for rank in range(2)} == {other}


async def test_a_worker_that_holds_a_slot_takes_no_second_one(cluster: Cluster) -> None:
    held = Placement(1.0, may_grow=True)
    cluster.nodes = [Node("n", 8)]
    await held.reserve([GENERATORS, replace(CRITIC, gpus=1)])
    held.release("generator-1")
    first = held.slot("generator-0")
    for _ in range(2):
        await held.reserve_again(GENERATORS, [0])
    assert held.slot("generator-0") is first
    await held.reserve_again(GENERATORS, [1])
    assert len(cluster.groups) == 2, "the spare one was left for it"


async def test_what_was_lost_together_is_placed_together_at_the_second_attempt_too(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        placement.ray.util, "placement_group_table", lambda _: {"bundles": {0: "x"}}
    )
    held = Placement(0.01, may_grow=True)
    await held.reserve([CRITIC, REWARD])
    cluster.nodes, cluster.kind = [Node("m", 8)], Contested
    monkeypatch.setattr(Contested, "in_the_way", True)
    held.release("reward-0")
    with pytest.raises(PlacementError):
        await held.reserve_again(REWARD, [0])
    Contested.in_the_way = False
    await held.reserve_again(REWARD, [0])
    for demand, ranks in ((REWARD, [1]), (CRITIC, [0, 1])):
        for rank in ranks:
            held.release(f"{demand.role}-{rank}")
        await held.reserve_again(demand, ranks)
    assert cluster.live()[0].free == 6
