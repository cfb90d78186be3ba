"""Places of the roles: a table of layouts, worked out by hand."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import load, resolve
from rlhf_ray.errors import PlacementError
from rlhf_ray.placement.layout import Demand, Node, Slot, demands, lay_out

CONFIGS = Path(__file__).parents[3] / "configs"
ROLLOUT, TRAIN = {"role": "rollout"}, {"role": "train"}


def nodes(*gpus: int) -> list[Node]:
    return [Node(f"node-{index}", count) for index, count in enumerate(gpus)]


def placed(*overrides: str, file: str = "stackllama/ppo_3x8_a100") -> list[Demand]:
    return demands(load(CONFIGS / f"{file}.yaml", list(overrides)))


def table(places: list[Slot]) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
    """Role -> (node, GPUs) by rank."""
    slots = defaultdict(list)
    for place in places:
        assert place.rank == len(slots[place.role]), "ranks are not in order"
        slots[place.role].append((place.node, place.gpus))
    return dict(slots)


def one_each(node: int, first: int, count: int) -> list[tuple[int, tuple[int, ...]]]:
    """Workers of a GPU each, one after the other."""
    return [(node, (first + index,)) for index in range(count)]


def policy(workers: int, gpus: float = 1) -> Demand:
    return Demand("policy", workers, gpus, is_group=True)


def critic(workers: int, gpus: float = 1) -> Demand:
    return Demand("critic", workers, gpus, is_group=True)


def generators(workers: int, gpus: float = 1, **labels: str) -> Demand:
    return Demand("generator", workers, gpus, labels)


CASES = {
    "three nodes of eight: a node for the policy, one for generators, one for the rest": (
        placed(
            *("placement={}", "critic.num_ranks=4", "reward.num_workers=2"),
            *("reference.kind=own", "reference.num_workers=2"),
        ),
        nodes(8, 8, 8),
        {
            "policy": one_each(0, 0, 8),
            "generator": one_each(2, 0, 8),
            "critic": one_each(1, 0, 4),
            "reference": one_each(1, 4, 2),
            "reward": one_each(1, 6, 2),
        },
    ),
    "three nodes of eight: a scorer beside each rank of the critic": (
        placed(),
        nodes(8, 8, 8),
        {
            "policy": one_each(0, 0, 8),
            "generator": one_each(2, 0, 8),
            "critic": one_each(1, 0, 8),
            "reward": one_each(1, 0, 8),
        },
    ),
    "one GPU: four roles have a quarter each": (
        placed(file="stackllama/ppo_1_gpu"),
        nodes(1),
        {role: [(0, (0,))] for role in ("policy", "critic", "reward", "generator")},
    ),
    "one node of eight: one worker of each role on every GPU": (
        placed(file="stackllama/ppo_1x8_a100"),
        nodes(8),
        dict.fromkeys(("policy", "critic", "reward", "generator"), one_each(0, 0, 8)),
    ),
    "one node of eight, a GPU for every worker": (
        placed(
            *("placement={}", "generators.num=3", "policy.num_ranks=2", "critic.num_ranks=1"),
            *("reference.kind=own", "reward.num_workers=1"),
            file="stackllama/ppo_1x8_a100",
        ),
        nodes(8),
        {
            "policy": one_each(0, 0, 2),
            "generator": one_each(0, 2, 3),
            "critic": one_each(0, 5, 1),
            "reference": one_each(0, 6, 1),
            "reward": one_each(0, 7, 1),
        },
    ),
    "engines of four GPUs": (
        placed(file="models/qwen25_32b_tp"),
        nodes(8, 8),
        {
            "policy": one_each(1, 0, 4),
            "generator": [(0, (0, 1, 2, 3)), (0, (4, 5, 6, 7))],
            "critic": one_each(1, 4, 2),
            "reference": one_each(1, 6, 1),
            "reward": one_each(1, 7, 1),
        },
    ),
    "uneven nodes: each group has the node that it fits best": (
        [policy(8), critic(2), generators(4)],
        nodes(2, 8, 4),
        {"policy": one_each(1, 0, 8), "critic": one_each(0, 0, 2), "generator": one_each(2, 0, 4)},
    ),
    "a node without GPUs has no one": (
        [policy(1), generators(1)],
        nodes(0, 2),
        {"policy": [(1, (0,))], "generator": [(1, (1,))]},
    ),
    "a group larger than a node spans as few as can be, ranks of a node together": (
        [policy(10)],
        nodes(4, 8, 2),
        {"policy": [*one_each(1, 0, 8), *one_each(2, 0, 2)]},
    ),
    "a role that fits no node whole leaves the smallest rest elsewhere": (
        [policy(4), generators(10)],
        nodes(8, 8),
        {"policy": one_each(0, 0, 4), "generator": [*one_each(1, 0, 8), *one_each(0, 4, 2)]},
    ),
    "halves: ranks of a group each on a GPU of their own, another role beside them": (
        [critic(4, 0.5), Demand("reference", 4, 0.5)],
        nodes(4),
        {"critic": one_each(0, 0, 4), "reference": one_each(0, 0, 4)},
    ),
    "workers of a stateless role share a GPU": (
        [Demand("reward", 3, 0.3333)],
        nodes(2),
        {"reward": [(0, (0,))] * 3},
    ),
    "two groups whose ranks take turns on the same GPUs": (
        [policy(2, 0.5), generators(2, 0.5)],
        nodes(2),
        {"policy": one_each(0, 0, 2), "generator": one_each(0, 0, 2)},
    ),
    "roles that may not share do not, though there were room": (
        [
            replace(policy(1, 0.5), sharers=frozenset({"policy"})),
            Demand("reward", 1, 0.25, sharers=frozenset({"reward", "reference"})),
            Demand("reference", 1, 0.5, sharers=frozenset({"reward", "reference"})),
        ],
        nodes(2),
        {"policy": [(0, (0,))], "reference": [(0, (1,))], "reward": [(0, (1,))]},
    ),
    "a worker without a GPU sits beside the others": (
        [policy(2), Demand("reward", 1, 0)],
        nodes(8, 4),
        {"policy": one_each(1, 0, 2), "reward": [(1, ())]},
    ),
    "labels: generators where nodes say rollout, the rest where they say train": (
        [
            replace(policy(2), labels=TRAIN),
            replace(critic(1), labels=TRAIN),
            generators(3, **ROLLOUT),
        ],
        [Node("a", 4, ROLLOUT), Node("b", 4, TRAIN)],
        {"policy": one_each(1, 0, 2), "critic": one_each(1, 2, 1), "generator": one_each(0, 0, 3)},
    ),
    "one label alone: who asks for another one goes where there is none": (
        [replace(policy(2), labels=TRAIN), generators(2, **ROLLOUT)],
        [Node("a", 2, ROLLOUT), Node("b", 8)],
        {"policy": one_each(1, 0, 2), "generator": one_each(0, 0, 2)},
    ),
    "no labels: they change nothing": (
        [replace(policy(2), labels=TRAIN), generators(2, **ROLLOUT)],
        nodes(2, 2),
        {"policy": one_each(0, 0, 2), "generator": one_each(1, 0, 2)},
    ),
    "who has fewer nodes to choose from is seated first": (
        [policy(4), generators(1, **ROLLOUT)],
        [Node("a", 4, ROLLOUT), Node("b", 4)],
        {"policy": one_each(1, 0, 4), "generator": one_each(0, 0, 1)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_workers_get_the_slots_in_the_table(name: str) -> None:
    asked, there, expected = CASES[name]
    places = lay_out(asked, there)
    assert table(places) == expected
    assert [place.role for place in places] == [d.role for d in asked for _ in range(d.workers)]


def test_shares_add_up_to_the_requested_gpus() -> None:
    places = lay_out(placed(file="models/qwen25_32b_tp"), nodes(8, 8))
    assert sum(place.share for place in places) == 16
    places = lay_out(placed(file="models/qwen25_0_5b_1gpu"), nodes(1))
    assert [place.share for place in places] == [0.2] * 5


TOO_SMALL = {
    "a node too few": (
        [policy(8), critic(4), generators(8)],
        nodes(8, 8),
        "policy 8 x 1, critic 4 x 1, generator 8 x 1; in total 20. Available: node-0 8, node-1 8; "
        "in total 16. It would fit with generators.num=4 or 1 more node of 8 GPUs",
    ),
    "an engine larger than every node": (
        [generators(2, 8)],
        nodes(4, 4, 4, 4),
        "generator 2 x 8; in total 16. Available: node-0 4, node-1 4, node-2 4, node-3 4; "
        "in total 16. It would fit with generators.tensor_parallel_size=4",
    ),
    "four whole roles on one GPU": (
        [policy(1), critic(1), Demand("reward", 1, 1), generators(1)],
        nodes(1),
        "It would fit with placement.gpus=0.25 or 3 more nodes of 1 GPU",
    ),
    "two ranks of a group on one GPU": (
        [policy(2, 0.5)],
        nodes(1),
        "policy 2 x 0.5; in total 1. Available: node-0 1; in total 1. It would fit with "
        "policy.num_ranks=1 or 1 more node of 1 GPU",
    ),
    "batches are divided among six ranks, so five would not do": (
        [policy(6)],
        nodes(5),
        "It would fit with policy.num_ranks=3 or 1 more node of 5 GPUs",
    ),
    "no node that carries a label": (
        [generators(1, pool="fast")],
        [Node("a", 8, {"pool": "slow"})],
        "generator 1 x 1 (pool=fast); in total 1. Available: a 8 (pool=slow); in total 8. "
        "It would fit with placement.generator.labels={}",
    ),
    "enough GPUs, but too few with the label": (
        [generators(3, **ROLLOUT)],
        [Node("a", 8), Node("b", 2, ROLLOUT)],
        "It would fit with generators.num=2 or placement.generator.labels={} or 1 more node of 8 "
        "GPUs (role=rollout)",
    ),
    "no node at all": (
        [policy(1)],
        [],
        "Available: no node; in total 0. It would fit with 1 more node of 8 GPUs",
    ),
}


@pytest.mark.parametrize("name", TOO_SMALL)
def test_an_error_says_what_would_fit_on_a_cluster_that_is_too_small(name: str) -> None:
    asked, there, message = TOO_SMALL[name]
    with pytest.raises(PlacementError) as error:
        lay_out(asked, there)
    assert str(error.value).endswith(message)


def asked(**config: Any) -> dict[str, tuple[int, float]]:
    return {d.role: (d.workers, d.gpus) for d in demands(resolve(config))}


def test_a_critic_is_requested_if_the_advantage_needs_one() -> None:
    assert asked()["critic"] == (1, 1)
    assert "critic" not in asked(ppo={"advantage": "reinforce"})
    assert asked(ppo={"advantage": "mine:own"})["critic"] == (1, 1)


@pytest.mark.parametrize(
    ("source", "gpus"),
    [
        ({"type": "model"}, 1),
        ({"type": "classifier", "path": "c"}, 1),
        ({"type": "rouge"}, 0),
        ({"type": "judge", "url": "http://x", "model": "m"}, 0),
    ],
)
def test_a_scorer_requests_a_gpu_if_it_runs_a_model(source: dict[str, Any], gpus: int) -> None:
    sources = [source, {"type": "rouge", "name": "r"}]
    assert asked(rewards=sources)["reward"] == (1, gpus)


def test_a_role_may_have_another_share_of_a_gpu_than_the_rest() -> None:
    found = asked(placement={"gpus": 0.5, "reward": {"gpus": 0.1}, "policy": {"gpus": 1.0}})
    assert found == {
        "policy": (1, 1),
        "critic": (1, 0.5),
        "reference": (1, 0.5),
        "reward": (1, 0.1),
        "generator": (1, 0.5),
    }


def test_with_placement_gpus_0_no_role_requests_a_gpu() -> None:
    asked = placed("placement.gpus=0", "placement.critic.gpus=0.5")
    assert {demand.gpus for demand in asked} == {0}


def test_a_reference_on_the_policys_base_requests_nothing() -> None:
    assert "reference" not in asked(reference={"kind": "policy_base"})


def test_sharing_sets_decide_which_roles_share_a_gpu() -> None:
    config = resolve({"placement": {"share": [["critic", "reference"], ["reward"]]}})
    sharers = {d.role: d.sharers for d in demands(config)}
    assert sharers["critic"] == sharers["reference"] == {"critic", "reference"}
    assert sharers["reward"] == {"reward"}
    assert sharers["policy"] == sharers["generator"] == {"policy", "generator"}
