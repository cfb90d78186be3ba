"""What scorers are started with, and what room a run asks for."""

from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.cluster.layout import Demand
from rlhf_ray.cluster.placement import Placement
from rlhf_ray.config import resolve
from rlhf_ray.stages import ppo_roles
from rlhf_ray.stages.ppo_roles import RoleSpawner, spawn_scorers


class Spawner:
    """Remembers what it was asked to start."""

    def spawn(self, role_class: type, role: str, count: int, *args: Any) -> list:
        self.count, self.args = count, args
        return [None]


def test_files_are_named_by_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer's process may run elsewhere in the file system."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    sources = [
        {"type": "function", "name": "file", "function": "mine.py:f"},
        {"type": "function", "name": "module", "function": "mine:f"},
        {"type": "model", "path": "model"},
        {"type": "classifier", "path": "hub/name"},
    ]
    spawner: Any = Spawner()
    spawn_scorers(spawner, resolve({"rewards": sources}), "reward", "policy")
    file, module, model, classifier = spawner.args[0]
    assert file.function == f"{tmp_path}/mine.py:f"
    assert module.function == "mine:f"
    assert model.path == str(tmp_path / "model")
    assert classifier.path == "hub/name"
    assert spawner.args[1].func is ppo_roles.reward_sources


async def test_room_is_asked_for_everybody_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for GPUs that no node has yet."""
    asked: list[Any] = []

    async def reserve(placement: Placement, demands: Any) -> None:
        pass

    monkeypatch.setattr(ppo_roles, "ask_for_room", asked.append)
    monkeypatch.setattr(Placement, "reserve", reserve)
    spawner = RoleSpawner(resolve({"cluster": {"mode": "ray"}}), lambda *_: None)
    await spawner.place([Demand("policy", 2, 1), Demand("reward", 1, 0), Demand("generator", 1, 2)])
    spawner.make_room(3)
    spawner.make_room(0)
    policy, generator = ({"CPU": 1.0, "GPU": n} for n in (1, 2))
    assert asked == [[*[policy] * 2, {"CPU": 1.0}, *[generator] * 3], []]
