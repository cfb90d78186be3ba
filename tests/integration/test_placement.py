"""Layouts on simulated clusters: who sits where, and PPO on three nodes of eight declared GPUs."""

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from simulated_clusters import simulated_cluster
from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.cluster.ray_workers import RayWorker
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.config import Config, load, resolve
from rlhf_ray.engines.factory import generation_engine
from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.placement.groups import LiveNode, live_nodes
from rlhf_ray.placement.layout import Demand, Slot, demands, lay_out
from rlhf_ray.stages.ppo import stage as ppo

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(590)]

CONFIG = Path(__file__).parents[2] / "configs" / "stackllama" / "ppo_3x8_a100.yaml"
TRAIN, ROLLOUT = {"role": "train"}, {"role": "rollout"}
Seats = dict[str, tuple[str, list[int]]]
"""Worker -> the id of its node, its GPUs."""


class Sitter:
    """An actor that does nothing but be somewhere."""

    def __init__(self, name: str) -> None:
        self._name = name


def where(_actor: Any) -> tuple[str, list[int]]:
    context = ray.get_runtime_context()
    return context.get_node_id(), sorted(int(index) for index in ray.get_gpu_ids())


async def seats(workers: Sequence[Any]) -> Seats:
    assert all(isinstance(worker, RayWorker) for worker in workers)
    told = [worker.actor.__ray_call__.remote(where) for worker in workers]
    return dict(zip([worker.name for worker in workers], await asyncio.gather(*told), strict=True))


def expected(asked: Sequence[Demand], nodes: Sequence[LiveNode]) -> Seats:
    places: list[Slot] = lay_out(asked, [live.node for live in nodes])
    return {f"{p.role}-{p.rank}": (nodes[p.node].id, list(p.gpus)) for p in places}


def nodes_of(found: Seats, role: str) -> list[str]:
    return [node for name, (node, _) in found.items() if name.startswith(f"{role}-")]


def config_of(*overrides: str) -> Config:
    return load(CONFIG, ["placement.timeout_s=3", *overrides])


def groups_left() -> int:
    """Read without the cluster's dashboard, whose port another cluster of this machine may have."""
    groups = ray.util.placement_group_table()
    return sum(group["state"] != "REMOVED" for group in groups.values())


@pytest.fixture(scope="module")
def by_value() -> Iterator[None]:
    """Actors of this file run where this file cannot be imported."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="module")
def three_by_eight(by_value: None) -> Iterator[None]:
    labels = (TRAIN | {"rack": "a"}, ROLLOUT, TRAIN | {"rack": "b"})
    nodes = [{"num_gpus": 8, "labels": of_node} for of_node in labels]
    with simulated_cluster(nodes):
        yield


@pytest.mark.usefixtures("three_by_eight")
async def test_actors_sit_where_the_layout_says_and_generators_come_and_go() -> None:
    """Whole GPUs, several, parts that two roles share but no two ranks of a group, and none."""
    config = config_of(
        *("critic.num_ranks=4", "reward.num_workers=4"),
        *("generators.num=2", "generators.tensor_parallel_size=4"),
    )
    asked = [*demands(config), Demand("reference", 2, 0, TRAIN)]
    with ray_session(config):
        nodes = live_nodes()
        rollout_node = next(n.id for n in nodes if n.node.labels.get("role") == "rollout")
        spawner = RoleSpawner(config, lambda *_: None)
        await spawner.place(asked)
        for demand in asked:
            spawner.spawn(Sitter, demand.role, demand.workers)
        found = await seats(spawner.workers)
        assert found == expected(asked, nodes)
        alone = [
            (node, gpu)
            for name, (node, gpus) in found.items()
            if "reward" not in name
            for gpu in gpus
        ]
        assert len(set(alone)) == len(alone) == 20, "a GPU has two actors that do not share it"
        assert nodes_of(found, "generator") == [rollout_node] * 2
        policy_node, other_node = nodes_of(found, "policy")[0], nodes_of(found, "critic")[0]
        assert nodes_of(found, "policy") == [policy_node] * 8
        for rank in range(4):
            assert found[f"reward-{rank}"] == found[f"critic-{rank}"]
            assert found[f"critic-{rank}"][0] == other_node
        assert len({policy_node, rollout_node, other_node}) == 3

        generator = next(demand for demand in asked if demand.role == "generator")
        with pytest.raises(PlacementError, match="generator 1 x 4"):
            await spawner.place_one(generator, 2)
        left = next(worker for worker in spawner.workers if worker.name == "generator-0")
        await spawner.end_one(left)
        await spawner.place_one(generator, 2)
        joined = await seats([spawner.spawn_one(Sitter, "generator-2")])
        assert joined == {"generator-2": found["generator-0"]}
        await spawner.stop_all()
        assert groups_left() == 0


@pytest.mark.usefixtures("three_by_eight")
def test_the_plan_of_the_live_cluster_is_that_of_its_nodes() -> None:
    done = CliRunner().invoke(app, ["plan", str(CONFIG), "--cluster", "live", "--json"])
    planned = json.loads(done.output)
    nodes = [(node["gpus"], node["labels"].get("role")) for node in planned["cluster"]]
    assert sorted(nodes, key=str) == [(0, None), (8, "rollout"), (8, "train"), (8, "train")]
    assert planned["fits"], planned["reasons"]
    config = config_of()
    with ray_session(config):
        places = lay_out(demands(config), [live.node for live in live_nodes()])
    found = [(place["role"], place["rank"]) for place in planned["placement"]]
    assert found == [(place.role, place.rank) for place in places]
    assert len(found) == 32


@pytest.mark.usefixtures("three_by_eight")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["generators.num=9"], "It would fit with generators.num=8 or "),
        (["placement.policy.labels={role: learn}"], "with placement.policy.labels={} or "),
        (["generators.tensor_parallel_size=16"], "fit with "),
    ],
)
async def test_what_does_not_fit_is_told_within_the_deadline(
    overrides: list[str], message: str
) -> None:
    config = config_of(*overrides)
    with ray_session(config):
        spawner = RoleSpawner(config, lambda *_: None)
        started = time.monotonic()
        with pytest.raises(PlacementError) as error:
            await spawner.place(demands(config))
        assert 3 <= time.monotonic() - started < 6
        assert message in str(error.value)
        assert "role=train" in str(error.value), "what the cluster has"
        assert "placement.timeout_s" in str(error.value)
        assert groups_left() == 0


@pytest.mark.usefixtures("three_by_eight")
async def test_gpus_of_others_are_told_and_waited_for() -> None:
    config = config_of()
    with ray_session(config):
        others = RoleSpawner(config, lambda *_: None)
        await others.place([Demand("generator", 2, 1, ROLLOUT)])
        spawner = RoleSpawner(config, lambda *_: None)
        with pytest.raises(PlacementError, match=r"In use by others: \S+ 2 of 8"):
            await spawner.place(demands(config))
        waiting = asyncio.create_task(spawner.place(demands(config)))
        await asyncio.sleep(0.5)
        await others.stop_all()
        await waiting
        await spawner.stop_all()


@pytest.mark.usefixtures("by_value")
async def test_roles_of_a_lost_node_are_placed_together_on_one_that_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_health_check_period_ms", "300")  # by default Ray takes 15 s to notice
    config = config_of("placement.timeout_s=60")
    with simulated_cluster([{"num_gpus": 2}]) as cluster, ray_session(config):
        spawner = RoleSpawner(config, lambda *_: None)
        asked = [Demand("critic", 2, 0.5, is_group=True), Demand("reward", 2, 0.5)]
        await spawner.place(asked)
        critic, reward = (spawner.spawn(Sitter, d.role, d.workers) for d in asked)
        before = await seats(spawner.workers)
        (lost,) = cluster.worker_nodes
        cluster.add_node(num_gpus=2, num_cpus=16, object_store_memory=100 * 2**20)
        cluster.remove_node(lost, allow_graceful=False)
        while any(live.id == before["critic-0"][0] for live in live_nodes()):
            await asyncio.sleep(0.5)
        await asyncio.gather(spawner._renew(critic), *(spawner._renew([one]) for one in reward))
        after = await seats(spawner.workers)
        assert after.keys() == before.keys()
        assert {node for node, _ in after.values()}.isdisjoint(node for node, _ in before.values())
        assert {after["critic-0"][1][0], after["critic-1"][1][0]} == {0, 1}
        await spawner.stop_all()
        assert groups_left() == 0


def test_ppo_takes_two_iterations_on_three_nodes_of_eight(
    tmp_path: Path,
    llama: str,
    reward_model: str,
    prompts_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    three_by_eight: None,
) -> None:
    config = config_of(
        f"run.dir={tmp_path}",
        f"model={{path: {llama}, dtype: float32, quantization: none, max_length: 96}}",
        f"sft.path={llama}",
        f"reward.path={reward_model}",
        f"data.prompts.path={prompts_file}",
        "rollout={engine: transformers, max_prompt_tokens: 64, max_tokens: 8, "
        "length_sampler: null, shard_size: 2}",
        "ppo={iterations: 2, batch_size: 16, mini_batch_size: 16, epochs: 1, eval_prompts: 8}",
        *("placement.policy={labels: {rack: a}}", "placement.critic={labels: {rack: b}}"),
        *("placement.reward={}", "policy.num_ranks=2", "critic.num_ranks=1"),
        *("generators.num=2", "reward.num_workers=1", "reference={kind: own, num_workers: 1}"),
    )
    found: Seats = {}
    start_all = RoleSpawner.start_all

    async def start_and_look(spawner: RoleSpawner, *args: Any) -> None:
        await start_all(spawner, *args)
        found.update(await seats(spawner.workers))

    monkeypatch.setattr(RoleSpawner, "start_all", start_and_look)
    with ray_session(config):
        planned = expected(demands(config), live_nodes())
        summary = ppo.run(config)
        assert groups_left() == 0
    assert found == planned
    assert len(found) == 7
    assert len({node for node, _ in found.values()}) == 3
    assert summary["iterations"] == summary["adapter_version"] == 2
    assert summary["samples_generated"] == summary["samples_learnt"] == 32


async def test_an_engine_that_cannot_sleep_takes_no_turns(llama: str) -> None:
    config = resolve({"placement": {"gpus": 0.5, "turns": True}, "model": {"path": llama}})
    with pytest.raises(ConfigError, match=r"placement.turns needs an engine that can sleep"):
        await generation_engine(config, llama, (0,)).start()
