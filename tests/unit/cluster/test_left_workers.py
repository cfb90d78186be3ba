"""Workers that one stage leaves to the next."""

from collections.abc import Iterator
from typing import Any

import pytest

from rlhf_ray.cluster import spawner as spawners
from rlhf_ray.cluster.ray_workers import RayWorker
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.config import Config, resolve
from rlhf_ray.placement.idle_actors import IDLE


class Role:
    """A role without a machine."""

    def __init__(self, name: str, base: str) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Start."""


class Actor:
    """Ray's handle of an actor; counts the calls that load its base."""

    def __init__(self) -> None:
        self.starts = 0
        self.start = self

    def remote(self) -> str:
        self.starts += 1
        return "loading"


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Actor]]:
    """Actors that were ended, on a machine where nothing needs a slot."""
    ended: list[Any] = []

    def spawn(_: type, name: str, *__: object, actor: Any, **___: object) -> RayWorker[Any]:
        return RayWorker(
            name,
            actor or Actor(),
            1.0,
            lambda *_: None,
            start_timeout_s=1.0,
            num_gpus=0,
            one_at_a_time=True,
        )

    monkeypatch.setattr(spawners, "spawn", spawn)
    monkeypatch.setattr(spawners, "needs_no_slots", lambda config: not config.placement.gpus)
    monkeypatch.setattr(spawners.ray, "kill", ended.append)
    yield ended
    IDLE.clear()


def config_of(**placement: object) -> Config:
    return resolve({"cluster": {"mode": "local"}, "placement": placement})


def actor_of(stage: RoleSpawner, name: str, base: str = "base") -> Actor:
    worker = stage.spawn_one(Role, name, base)
    assert isinstance(worker, RayWorker)
    return worker.actor


def test_the_next_stage_goes_on_with_the_actors_that_are_left(ended: list[Actor]) -> None:
    before, after = (RoleSpawner(config_of(), lambda *_: None) for _ in range(2))
    left = [actor_of(before, name) for name in ("generator-0", "reward-0")]
    policy = actor_of(before, "policy-0")
    before.leave(["generator-0", "reward-0"])
    assert [worker.name for worker in before.workers] == ["policy-0"]  # the stage ends this one
    assert [actor.starts for actor in left] == [1, 0]  # a generator's base loads meanwhile
    names = ("generator-0", "reward-0", "policy-0")
    found = [actor_of(after, name) for name in names]
    assert found[:2] == left
    assert found[2] is not policy
    assert not ended


def test_an_actor_of_another_base_is_ended_first(ended: list[Actor]) -> None:
    before, after = (RoleSpawner(config_of(), lambda *_: None) for _ in range(2))
    left = actor_of(before, "generator-0")
    before.leave(["generator-0"])
    assert actor_of(after, "generator-0", "other") is not left
    assert ended == [left]


def test_actors_with_slots_are_not_left(ended: list[Actor]) -> None:
    before = RoleSpawner(config_of(gpus=0.5), lambda *_: None)
    actor_of(before, "reward-0")
    before.leave(["reward-0"])
    assert [worker.name for worker in before.workers] == ["reward-0"]
