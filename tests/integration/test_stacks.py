"""The stacks of actors that hang, on any node of a cluster; real Ray, real processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from simulated_clusters import simulated_cluster

from rlhf_ray import stacks
from rlhf_ray.cluster.nodes import actor_stacks, alive_nodes
from rlhf_ray.cluster.process_titles import titled

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(120)]

ENGINE = "import time\ndef hang_in_the_engine():\n    time.sleep(600)\nhang_in_the_engine()"


class Hanging:
    """A role that hangs in its constructor's thread, beside a process of an engine."""

    def __init__(self, name: str) -> None:
        self._engine = subprocess.Popen([sys.executable, "-c", ENGINE])

    def learn(self, marker: str) -> None:
        self._wait_for_ranks_that_never_come(Path(marker))

    def _wait_for_ranks_that_never_come(self, marker: Path) -> None:
        marker.touch()
        time.sleep(600)


def test_the_stacks_of_hanging_actors_on_all_nodes_name_the_functions(tmp_path: Path) -> None:
    with simulated_cluster([{"num_cpus": 1}]):
        ray.init(
            address="auto", runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
        )
        nodes = alive_nodes()
        assert len(nodes) == 2
        actors = []
        for rank, node in enumerate(nodes):
            strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            name = f"policy-{rank}"
            options = {"name": name, "num_cpus": 0, "scheduling_strategy": strategy}
            actors.append(ray.remote(titled(Hanging)).options(**options).remote(name))
            actors[-1].learn.remote(str(tmp_path / name))
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        found = actor_stacks(60.0)
        assert set(found) == {"policy-0", "policy-1"}
        for text in found.values():
            assert "_wait_for_ranks_that_never_come" in text
            assert "hang_in_the_engine" in text
        # Where py-spy may not attach, such as in a container, actors write their own.
        pid = ray._private.state.actors(actors[0]._actor_id.hex())["Pid"]
        assert "_wait_for_ranks_that_never_come" in stacks._by_signal(pid)
