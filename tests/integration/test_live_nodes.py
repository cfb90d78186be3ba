"""A live cluster's answer about its GPUs; real Ray, a stand-in for the driver's program."""

import os
from pathlib import Path

import pytest
from simulated_clusters import simulated_cluster

from rlhf_ray.placement.hardware import live_cluster

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(200)]

CALLED_A100 = {"num_gpus": 8, "labels": {"ray.io/accelerator-type": "A100"}}


def test_a_size_that_ray_does_not_tell_is_asked_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi = tmp_path / "nvidia-smi"
    nvidia_smi.write_text("#!/bin/sh\necho 580.95.05, 100, 81920\n")
    nvidia_smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with simulated_cluster([CALLED_A100]):
        kinds = {node.gpus: node.gpu_kind for node in live_cluster()}
        assert kinds == {0: None, 8: "A100-80GB"}
        nvidia_smi.write_text("#!/bin/sh\nexit 1\n")
        kinds = {node.gpus: node.gpu_kind for node in live_cluster()}
        assert kinds == {0: None, 8: None}
