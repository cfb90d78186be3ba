"""Placement of generators that join, and the end of processes that do not start."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.config import resolve
from rlhf_ray.errors import ActorFailure
from rlhf_ray.placement.layout import Demand
from rlhf_ray.stages.ppo import generators as generator_factory
from rlhf_ray.stages.ppo.generators import GeneratorFactory


class Worker:
    def __init__(self, name: str, spawner: "Spawner") -> None:
        self.name = name
        self._spawner = spawner

    async def call(self, method: Callable[..., Any]) -> None:
        assert method.__name__ == "start"
        if self._spawner.never_ready:
            await asyncio.Event().wait()
        if self._spawner.fails:
            raise ActorFailure("no engine")


class Spawner:
    """Remembers what it was asked to start and to end."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.fails = False
        self.never_ready = False
        self.placed: list[tuple[float, int]] = []

    async def place_one(self, demand: Demand, rank: int) -> None:
        self.placed.append((demand.gpus, rank))

    def spawn_one(self, role_class: type, name: str, *args: Any) -> Worker:
        return Worker(name, self)

    async def end_one(self, worker: Worker) -> None:
        self.ended.append(worker.name)


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> GeneratorFactory:
    monkeypatch.setattr(generator_factory, "stop_token_ids", lambda *_: (0,))
    spawner: Any = Spawner()
    config = resolve(
        {"cluster": {"mode": "ray"}, "generators": {"tensor_parallel_size": 2}, "lora": {"r": 4}}
    )
    return GeneratorFactory(spawner, config, "base")


async def test_a_generator_that_starts_is_returned_on_its_slot(factory: GeneratorFactory) -> None:
    generator = await factory.start("generator-3")
    assert generator.name == "generator-3"
    assert factory._spawner.placed == [(2, 3)]
    assert factory._spawner.ended == []
    await factory.end(generator)
    assert factory._spawner.ended == ["generator-3"]


async def test_a_generator_that_fails_to_start_leaves_no_process(factory: GeneratorFactory) -> None:
    factory._spawner.fails = True
    with pytest.raises(ActorFailure, match="no engine"):
        await factory.start("generator-3")
    assert factory._spawner.ended == ["generator-3"]


async def test_a_cancelled_start_of_a_generator_leaves_no_process(
    factory: GeneratorFactory,
) -> None:
    factory._spawner.never_ready = True
    start = asyncio.ensure_future(factory.start("generator-3"))
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert factory._spawner.ended == ["generator-3"]
