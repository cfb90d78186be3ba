"""The doctor of a cluster, on a simulated one of two nodes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from simulated_clusters import simulated_cluster
from typer.testing import CliRunner

from rlhf_ray.cli import app

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with simulated_cluster([{}]) as made:
        yield made


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
