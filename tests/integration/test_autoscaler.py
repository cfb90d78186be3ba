"""Ray's own autoscaler brings the nodes that a run asks for, and takes them back.

Its nodes are processes of this machine, which Ray's provider for tests starts and ends.
"""

import json
from pathlib import Path

import pytest
from job_cluster import free_port, job_cluster

pytestmark = [pytest.mark.integration, pytest.mark.slow]

HEAD_NODE = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"
"""As Ray's provider for tests calls it."""
PLACES = """
import asyncio, sys, time
import ray
from rlhf_ray.placement.layout import Demand
from rlhf_ray.placement.groups import live_nodes
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config import resolve
from rlhf_ray.cluster.spawner import RoleSpawner

config = resolve({"cluster": {"mode": "ray"}, "placement": {"timeout_s": 60}})
spawner = RoleSpawner(config, lambda *_: None)

async def place():
    await spawner.place([Demand("generator", 2, 1, {"role": "rollout"})])
    held = [live.node for live in live_nodes() if live.free < live.node.gpus]
    print("came", [node.labels["role"] for node in held])
    await spawner.stop_all()

with ray_session(config):
    asyncio.run(place())
    deadline = time.monotonic() + 60
    while len(live_nodes()) > 1:
        assert time.monotonic() < deadline, "they stay"
        time.sleep(0.5)
    print("gone")
"""


def node_type(role: str) -> dict[str, object]:
    resources = {"CPU": 1, "GPU": 1, "object_store_memory": 100 * 2**20}
    return {"resources": resources, "labels": {"role": role}, "max_workers": 3, "node_config": {}}


def test_nodes_with_the_labels_of_a_layout_come_and_go(tmp_path: Path) -> None:
    port = free_port() + 2
    config = {
        "cluster_name": "test",
        "max_workers": 6,
        "idle_timeout_minutes": 0.05,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.2:{port}",
            "head_node_id": HEAD_NODE,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 8}, "max_workers": 0, "node_config": {}},
            "train": node_type("train"),
            "rollout": node_type("rollout"),
        },
        "head_node_type": "ray.head.default",
        **{f"{part}setup_commands": [] for part in ("", "head_", "worker_")},
        "cluster_synced_files": [],
    }
    written = tmp_path / "autoscaler.json"
    written.write_text(json.dumps(config))
    variables = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_NODE,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    option = f"--autoscaling-config={written}"
    with job_cluster(tmp_path, option, port=port, **variables) as cluster:
        cluster.environment["RAY_ADDRESS"] = f"127.0.0.2:{port}"
        done = cluster.run("python", "-c", PLACES)
    assert done.code == 0, done.output
    assert "came ['rollout', 'rollout']" in done.output
    assert done.output.rstrip().endswith("gone")
