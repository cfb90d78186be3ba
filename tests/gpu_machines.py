"""Machines with GPUs that runs find, and the configs that they settle on."""

from pathlib import Path

import pytest

from rlhf_ray.config import Config, load
from rlhf_ray.placement.layout import Node
from rlhf_ray.stages.gpu_layout import settle_layout

CONFIGS = Path(__file__).parents[1] / "configs"
QUICK, QWEN = CONFIGS / "quickstart.yaml", CONFIGS / "models" / "qwen25_0_5b_1gpu.yaml"


def machine(monkeypatch: pytest.MonkeyPatch, node: Node) -> None:
    monkeypatch.setattr("rlhf_ray.planning.plan.this_machine", lambda: node)


def settled(monkeypatch: pytest.MonkeyPatch, node: Node, path: Path, *keys: str) -> Config:
    machine(monkeypatch, node)
    config = load(path, keys)
    said: list[str] = []
    found = settle_layout(config, config.run.stages, said.append)
    assert not [line for line in said if line.startswith("Warning")]
    return found
