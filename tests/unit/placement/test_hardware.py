"""Clusters as people write them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from rlhf_ray.cluster.nodes import Answer, ClusterNode
from rlhf_ray.config import load
from rlhf_ray.doctor import live_nodes
from rlhf_ray.errors import ConfigError, PlacementError
from rlhf_ray.placement import hardware
from rlhf_ray.placement.hardware import GPU_KINDS, gpu_kind, parse_cluster


@pytest.mark.parametrize(
    ("text", "gpus", "kinds"),
    [
        ("3x8xA100-80GB", [8, 8, 8], ["A100-80GB"] * 3),
        ("1xT4-16GB", [1], ["T4-16GB"]),
        ("8xA100-80GB+2x4xL40S-48GB", [8, 4, 4], ["A100-80GB", "L40S-48GB", "L40S-48GB"]),
    ],
)
def test_a_cluster_is_parsed_from_numbers_and_kinds(
    text: str, gpus: list[int], kinds: list[str]
) -> None:
    nodes = parse_cluster(text)
    assert [node.gpus for node in nodes] == gpus
    assert [node.gpu_kind for node in nodes] == kinds
    assert [node.name for node in nodes] == [f"node-{i}" for i in range(len(gpus))]


@pytest.mark.parametrize("text", ["", "A100-80GB", "3x8", "0x8xA100-80GB", "8xA100-80GB+"])
def test_a_malformed_cluster_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write for example 3x8xA100-80GB"):
        parse_cluster(text)


def test_an_unknown_kind_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"'A100-8GB' is not a known kind of GPU; known are .*T4"):
        parse_cluster("8xA100-8GB")


@pytest.mark.parametrize(
    ("driver_name", "memory_gb", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", 85.9, "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", 42.9, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", None, None),
        ("Tesla V100-SXM2-32GB", 34.4, "V100-32GB"),
        ("Tesla V100-SXM2-16GB", None, None),
        ("NVIDIA H100 80GB HBM3", 85.5, "H100-80GB"),
        ("NVIDIA H100 80GB HBM3", None, "H100-80GB"),
        ("NVIDIA H200", None, "H200-141GB"),
        ("NVIDIA B200", None, "B200-192GB"),
        ("NVIDIA L40S", None, "L40S-48GB"),
        ("NVIDIA L4", 24.2, "L4-24GB"),
        ("NVIDIA A10G", None, "A10G-24GB"),
        ("Tesla T4", None, "T4-16GB"),
        ("NVIDIA RTX A6000", None, "A6000-48GB"),
        ("NVIDIA GeForce RTX 4090", None, "RTX4090-24GB"),
        ("NVIDIA GB10", 85.9, None),
    ],
)
def test_a_gpu_kind_is_found_by_rays_name_and_memory(
    driver_name: str, memory_gb: float | None, kind: str | None
) -> None:
    ray_name = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(driver_name)
    assert ray_name is not None
    assert gpu_kind(ray_name, memory_gb) == kind


def test_a_labelled_memory_size_needs_no_measured_one() -> None:
    assert gpu_kind("A100-80G", None) == "A100-80GB"
    assert gpu_kind("A100-40G", None) == "A100-40GB"
    assert gpu_kind("", 85.9) is None


def test_kinds_have_about_the_memory_in_their_names() -> None:
    for name, kind in GPU_KINDS.items():
        written = float(name.rpartition("-")[2].removesuffix("GB"))
        assert written <= kind.memory_gb <= written * 1.08


def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    (tmp_path / "stand_in.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(hardware, "LIVE_NODES_MODULE", "stand_in")


def test_nodes_of_a_live_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    labels = {"ray.io/accelerator-type": "A100", "role": "train"}
    entry = {"NodeManagerAddress": "10.0.0.1", "Resources": {"GPU": 8.0}, "Labels": labels}
    pairs = [(entry, 85.9), (entry, 42.9), (entry, None)]
    body = f"import json; print('a line'); print(json.dumps({pairs}))"
    answering(monkeypatch, tmp_path, body)
    nodes = hardware.live_cluster()
    assert (nodes[0].name, nodes[0].gpus, nodes[0].labels["role"]) == ("10.0.0.1", 8, "train")
    assert [node.gpu_kind for node in nodes] == ["A100-80GB", "A100-40GB", None]


def test_only_nodes_with_gpus_are_asked_for_their_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def entry(node_id: str, **resources: float) -> dict[str, Any]:
        address = {"NodeID": node_id, "NodeManagerAddress": node_id}
        return {**address, "Alive": node_id != "dead", "Resources": resources}

    def answers(nodes: Sequence[ClusterNode], *_: Any) -> list[Answer[float]]:
        asked.extend(node.node_id for node in nodes)
        known = {"b": 85.9}
        return [Answer(node, known.get(node.node_id), "late") for node in nodes]

    asked: list[str] = []
    entries = [entry("c", GPU=8), entry("head", CPU=4), entry("dead", GPU=8), entry("b", GPU=8)]
    monkeypatch.setattr(live_nodes, "require_cluster", lambda: None)
    monkeypatch.setattr("ray.init", lambda **_: None)
    monkeypatch.setattr("ray.nodes", lambda: entries)
    monkeypatch.setattr(live_nodes, "on_nodes", answers)
    live_nodes.main()
    printed = json.loads(capsys.readouterr().out)
    assert asked == ["b", "c"]
    found = {node["NodeID"]: memory_gb for node, memory_gb in printed}
    assert found == {"c": None, "head": None, "b": 85.9}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise ConnectionError('nobody there')", "ConnectionError: nobody there"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_cluster_that_does_not_answer_is_reported_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, why: str
) -> None:
    monkeypatch.setattr(hardware, "LIVE_NODES_TIMEOUT_S", 1.0)
    answering(monkeypatch, tmp_path, body)
    with pytest.raises(PlacementError, match=rf"\({why}\)\. Set RAY_ADDRESS, or describe"):
        hardware.live_cluster()


@pytest.mark.parametrize(("gpus", "seen"), [("0", ""), ("0.5", "3"), ("1", "3")])
def test_without_gpus_for_roles_this_process_sees_none(
    gpus: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    hardware.hide_gpus(load(None, [f"placement.gpus={gpus}"]))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
