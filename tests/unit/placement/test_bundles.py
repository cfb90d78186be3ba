"""Bundles that are reserved together."""

from pathlib import Path

import pytest

from rlhf_ray.config import load
from rlhf_ray.placement.bundles import Bundle, placement_groups
from rlhf_ray.placement.layout import Demand, Node, demands, lay_out

CONFIGS = Path(__file__).parents[3] / "configs"


def groups(asked: list[Demand], *gpus: int) -> list[list[Bundle]]:
    nodes = [Node(f"node-{index}", count) for index, count in enumerate(gpus)]
    return placement_groups(lay_out(asked, nodes))


def test_groups_of_three_nodes_of_eight() -> None:
    found = groups(demands(load(CONFIGS / "stackllama" / "ppo_3x8_a100.yaml")), 8, 8, 8)
    names = [[worker for bundle in group for worker in bundle.workers] for group in found]
    assert names == [
        [f"policy-{rank}" for rank in range(8)],
        [f"{role}-{rank}" for rank in range(8) for role in ("critic", "reward")],
        *([f"generator-{index}"] for index in range(8)),
    ]
    assert found[0] == [Bundle(0, (rank,), (f"policy-{rank}",)) for rank in range(8)]
    assert found[0][0].resources == {"CPU": 1, "GPU": 1}


def test_roles_that_meet_on_a_gpu_are_reserved_together() -> None:
    found = groups(demands(load(CONFIGS / "stackllama" / "ppo_1_gpu.yaml")), 1)
    everyone = ("policy-0", "critic-0", "reward-0", "generator-0")
    assert len(found) == 1
    assert found[0] == [Bundle(0, (0,), everyone)]
    assert found[0][0].resources == {"CPU": 4, "GPU": 1}


def test_a_generator_beside_a_rank_is_in_its_group_and_one_alone_is_not() -> None:
    asked = [Demand("policy", 2, 0.5, is_group=True), Demand("generator", 3, 0.5)]
    found = groups(asked, 3)
    assert found == [
        [
            Bundle(0, (0,), ("policy-0", "generator-0")),
            Bundle(0, (1,), ("policy-1", "generator-1")),
        ],
        [Bundle(0, (2,), ("generator-2",))],
    ]


def test_an_engine_of_several_gpus_is_one_bundle() -> None:
    found = groups([Demand("generator", 2, 4)], 4, 4)
    assert found == [
        [Bundle(0, (0, 1, 2, 3), ("generator-0",))],
        [Bundle(1, (0, 1, 2, 3), ("generator-1",))],
    ]
    assert found[0][0].resources == {"CPU": 1, "GPU": 4}


@pytest.mark.parametrize("count", [1, 2])
def test_workers_without_gpus_have_a_cpu_each(count: int) -> None:
    found = groups([Demand("reward", count, 0)], 8)
    assert found == [[Bundle(0, (), (f"reward-{rank}",)) for rank in range(count)]]
    assert found[0][0].resources == {"CPU": 1}
