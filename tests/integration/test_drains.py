"""A node of a real, simulated cluster drains."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from prepared_runs import make_config
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from simulated_clusters import simulated_cluster

from rlhf_ray.cluster.life_signs import Watch
from rlhf_ray.cluster.ray_workers import RayWorker, spawn
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.errors import ActorFailure
from rlhf_ray.placement.groups import draining_nodes, live_nodes
from rlhf_ray.stages.ppo.drains import Drains, _look

pytestmark = pytest.mark.integration


class Sitter:
    """A role that only sits on its node."""

    def __init__(self, name: str) -> None:
        self.name = name

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def sitter(name: str, node: str | None) -> RayWorker[Sitter]:
    return spawn(
        Sitter,
        name,
        num_cpus=1,
        num_gpus=0,
        strategy=NodeAffinitySchedulingStrategy(node, soft=False) if node else "DEFAULT",
        concurrency=1,
        environment={},
        start_timeout_s=60.0,
        timeout_s=60.0,
        on_call=lambda *_: None,
        watch=Watch(),
        node_id=node,
    )


async def test_a_process_on_a_draining_node_ends_and_starts_elsewhere(tmp_path: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = make_config(tmp_path, cluster={"mode": "ray"})
    with simulated_cluster([{"num_cpus": 2}]) as cluster, ray_session(config):
        own = ray.get_runtime_context().get_node_id()
        (away,) = (node.id for node in live_nodes() if node.id != own)
        first = sitter("reward-0", away)
        assert await first.call(Sitter.node) == away
        drain = ["drain-node", "--node-id", away, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")),
                *drain,
                *("--reason-message", "spot", "--deadline-remaining-seconds", "120"),
            ],
            env={**os.environ, "RAY_ADDRESS": cluster.address},
            check=True,
        )
        assert 60 < draining_nodes()[away] - time.time() < 121
        assert [node.id for node in live_nodes()] == [own]
        said: list[str] = []
        Drains(lambda: [first], {}, said.append).leave(*_look())
        with pytest.raises(ActorFailure):
            await first.call(Sitter.node)
        assert said
        assert said[0].startswith(f"Node {away[:8]} leaves the cluster in")
        assert await sitter("reward-1", None).call(Sitter.node) == own
