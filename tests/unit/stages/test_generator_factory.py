"""What becomes of processes that do not start, and what room is asked for."""

import asyncio
from typing import Any

import pytest

from rlhf_ray.config import resolve
from rlhf_ray.errors import ActorFailure
from rlhf_ray.stages import generator_factory
from rlhf_ray.stages.generator_factory import GeneratorFactory


class Worker:
    def __init__(self, name: str) -> None:
        self.name = name


class Spawner:
    """Remembers what it was asked to start and to end."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self.fails = False
        self.never_ready = False
        self.held = {"policy-0": {"CPU": 1, "GPU": 1}, "generator-0": {"CPU": 1, "GPU": 2}}

    def spawn_one(self, role_class: type, name: str, *args: Any, num_gpus: int) -> Worker:
        return Worker(name)

    async def start_one(self, worker: Worker) -> None:
        if self.never_ready:
            await asyncio.Event().wait()
        if self.fails:
            raise ActorFailure("no engine")

    async def end_one(self, worker: Worker) -> None:
        self.ended.append(worker.name)

    def resources(self, num_gpus: int) -> dict[str, float]:
        return {"CPU": 1, "GPU": num_gpus}


@pytest.fixture
def factory(monkeypatch: pytest.MonkeyPatch) -> GeneratorFactory:
    monkeypatch.setattr(generator_factory, "stop_token_ids", lambda *_: (0,))
    spawner: Any = Spawner()
    config = resolve(
        {"cluster": {"mode": "ray"}, "generators": {"tensor_parallel_size": 2}, "lora": {"r": 4}}
    )
    return GeneratorFactory(spawner, config, "base")


async def test_one_that_starts_is_handed_over(factory: GeneratorFactory) -> None:
    generator = await factory.start("generator-3")
    assert generator.name == "generator-3"
    assert factory._spawner.ended == []
    await factory.end(generator)
    assert factory._spawner.ended == ["generator-3"]


async def test_one_that_fails_to_start_leaves_no_process(factory: GeneratorFactory) -> None:
    factory._spawner.fails = True
    with pytest.raises(ActorFailure, match="no engine"):
        await factory.start("generator-3")
    assert factory._spawner.ended == ["generator-3"]


async def test_one_that_is_not_wanted_any_more_leaves_no_process(factory: GeneratorFactory) -> None:
    factory._spawner.never_ready = True
    start = asyncio.ensure_future(factory.start("generator-3"))
    await asyncio.sleep(0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert factory._spawner.ended == ["generator-3"]


def test_room_is_asked_for_everybody_and_given_back(
    factory: GeneratorFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(generator_factory, "ask_for_room", asked.append)
    factory.make_room(3)
    factory.make_room(0)
    assert asked == [[{"CPU": 1, "GPU": 1}, *[{"CPU": 1, "GPU": 2}] * 3], []]
