"""A cluster of two simulated nodes: its doctor, the stacks of its actors, a node that drains."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from prepared_runs import make_config
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from simulated_clusters import simulated_cluster
from typer.testing import CliRunner

from rlhf_ray import stacks
from rlhf_ray.cli import app
from rlhf_ray.cluster.life_signs import Watch
from rlhf_ray.cluster.nodes import actor_stacks, alive_nodes
from rlhf_ray.cluster.process_titles import titled
from rlhf_ray.cluster.ray_workers import RayWorker, spawn
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.errors import ActorFailure
from rlhf_ray.placement.groups import draining_nodes, live_nodes
from rlhf_ray.stages.ppo.drains import Drains, _look

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    with simulated_cluster([{"num_cpus": 2}]) as made:
        yield made


@pytest.fixture
def cluster(two_nodes: Cluster) -> Iterator[Cluster]:
    """The cluster; a test's connection and its actors end with it."""
    yield two_nodes
    ray.shutdown()


@pytest.mark.slow
def test_every_node_and_link_is_looked_at(cluster: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"run: {{dir: {tmp_path / 'run'}}}\n")
    done = CliRunner().invoke(app, ["doctor", str(config), "--cluster"])
    assert done.exit_code == 0, done.output
    for node in (cluster.head_node, *cluster.worker_nodes):
        assert f"({node.node_id[:8]}):" in done.output
    names = [
        "driver",
        "/dev/shm",
        "limits",
        "ninja",
        "orphans",
        "interface",
        "ports",
        "versions",
    ]
    for name in names:
        assert name in done.output
    assert done.output.count("Ray asks for one") == 2
    assert "Gbit/s" in done.output
    paths = f"run.dir {tmp_path / 'run'} and the same models on all nodes"
    assert "".join(paths.split()) in "".join(done.output.split())  # it is wrapped, at hyphens too

    slow = CliRunner().invoke(app, ["doctor", "--cluster", "--min-bandwidth", "100000"])
    assert slow.exit_code == 1
    assert "under 100000 (--min-bandwidth)" in " ".join(slow.output.split())


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


@pytest.mark.slow
def test_the_stacks_of_hanging_actors_on_all_nodes_name_the_functions(
    cluster: Cluster, tmp_path: Path
) -> None:
    ray.init(address="auto", runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}})
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


async def test_a_process_on_a_draining_node_ends_and_starts_elsewhere(
    cluster: Cluster, tmp_path: Path
) -> None:
    """The last test of its cluster."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = make_config(tmp_path, cluster={"mode": "ray"})
    with ray_session(config):
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
