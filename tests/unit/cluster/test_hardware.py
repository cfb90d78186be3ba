"""Clusters as people write them."""

from pathlib import Path

import pytest

from rlhf_ray.cluster import hardware
from rlhf_ray.cluster.hardware import GPU_KINDS, kind_called, parse_cluster
from rlhf_ray.errors import ConfigError, PlacementError


@pytest.mark.parametrize(
    ("text", "gpus", "kinds"),
    [
        ("3x8xA100-80GB", [8, 8, 8], ["A100-80GB"] * 3),
        ("1xT4-16GB", [1], ["T4-16GB"]),
        ("8xA100-80GB+2x4xL40S-48GB", [8, 4, 4], ["A100-80GB", "L40S-48GB", "L40S-48GB"]),
    ],
)
def test_nodes_are_written_as_numbers_and_kinds(
    text: str, gpus: list[int], kinds: list[str]
) -> None:
    nodes = parse_cluster(text)
    assert [node.gpus for node in nodes] == gpus
    assert [node.gpu_kind for node in nodes] == kinds
    assert [node.name for node in nodes] == [f"node-{i}" for i in range(len(gpus))]


@pytest.mark.parametrize("text", ["", "A100-80GB", "3x8", "0x8xA100-80GB", "8xA100-80GB+"])
def test_what_is_no_cluster_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write for example 3x8xA100-80GB"):
        parse_cluster(text)


def test_an_unknown_kind_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"'A100-8GB' is no known kind of GPU; known are .*T4"):
        parse_cluster("8xA100-8GB")


def test_a_name_of_rays_is_a_kind_and_of_two_sizes_the_smaller() -> None:
    assert kind_called("A100") == "A100-40GB"
    assert kind_called("A100-80G") == "A100-80GB"
    assert kind_called("") is None


def test_kinds_have_about_the_memory_in_their_names() -> None:
    for name, kind in GPU_KINDS.items():
        written = float(name.rpartition("-")[2].removesuffix("GB"))
        assert written <= kind.memory_gb <= written * 1.08


def answering(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> None:
    (tmp_path / "stand_in.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(hardware, "ASKS_RAY", "stand_in")


def test_nodes_of_a_live_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    labels = {"ray.io/accelerator-type": "A100", "role": "train"}
    node = {"NodeManagerAddress": "10.0.0.1", "Resources": {"GPU": 8.0}, "Labels": labels}
    answering(monkeypatch, tmp_path, f"import json; print('a line'); print(json.dumps([{node}]))")
    (found,) = hardware.live_cluster()
    assert (found.name, found.gpus, found.labels["role"]) == ("10.0.0.1", 8, "train")
    assert found.gpu_kind is not None


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise ConnectionError('nobody there')", "ConnectionError: nobody there"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_cluster_that_does_not_answer_is_told_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str, why: str
) -> None:
    monkeypatch.setattr(hardware, "ASK_TIMEOUT_S", 1.0)
    answering(monkeypatch, tmp_path, body)
    with pytest.raises(PlacementError, match=rf"\({why}\); say what it would be"):
        hardware.live_cluster()
