"""`doctor --cluster` over stand-ins for Ray."""

import pytest
import ray
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.cluster.nodes import Answer, ClusterNode
from rlhf_ray.doctor import cluster as cluster_doctor


def test_nodes_that_do_not_answer_are_reported_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [ClusterNode(address, address, address) for address in ("10.0.0.1", "10.0.0.2")]
    silent = [Answer(node, None, "did not answer within 120 s") for node in nodes]
    monkeypatch.setattr(cluster_doctor, "require_cluster", lambda: None)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster_doctor, "alive_nodes", lambda: nodes)
    monkeypatch.setattr(cluster_doctor, "on_nodes", lambda *_: silent)
    done = CliRunner().invoke(cli.app, ["doctor", "--cluster"])
    assert done.exit_code == 1, done.exception
    assert "10.0.0.1:\n" in done.stdout
    assert "10.0.0.2:\n" in done.stdout
    assert done.stdout.count("did not answer within 120 s") == 2
    assert "All 2 nodes" not in done.stdout
