"""Two sides on one GPU: who is awake when."""

import asyncio
from typing import Any

import pytest

from rlhf_ray.cluster.colocation import Turns, TurnWorker
from rlhf_ray.errors import ActorFailure, WeightSyncError


class Sleeper:
    """A worker that knows whether it is awake, and writes down what it is asked."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self.awake = True
        self.raises: dict[str, Exception] = {}
        self._events = events

    async def address(self) -> str:
        return "127.0.0.1"

    async def call(self, method: str, *args: Any) -> Any:
        self._events.append(f"{self.name} {method}")
        if method in self.raises:
            raise self.raises[method]
        if method in ("sleep", "wake"):
            assert self.awake == (method == "sleep"), f"{self.name} was told to {method} twice"
            self.awake = method == "wake"
            return
        assert self.awake, f"{self.name} was asked for {method} in its sleep"
        await asyncio.sleep(0.001)
        assert self.awake, f"{self.name} was put to sleep during {method}"

    async def call_split(self, method: str, *args: Any) -> tuple[Any, Any]:
        return await self.call(method, *args), None


class Pair:
    """A generator and a learner on one GPU."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.turns = Turns()
        self.sleepers = {name: Sleeper(name, self.events) for name in ("generator", "learner")}
        self.generator, self.learner = (
            TurnWorker(worker, self.turns, name) for name, worker in self.sleepers.items()
        )

    async def start(self) -> None:
        await asyncio.gather(self.generator.call("start"), self.learner.call("start"))


async def test_one_starts_after_the_other_is_asleep() -> None:
    pair = Pair()
    await pair.start()
    assert pair.events == ["generator start", "generator sleep", "learner start"]


async def test_a_call_waits_until_the_other_side_has_nothing_more_to_do() -> None:
    pair = Pair()
    await pair.start()
    pair.events.clear()

    async def lane(first: int) -> list[asyncio.Task[Any]]:
        """Three shards one after the other, each scored as soon as it is there."""
        scoring = []
        for number in range(first, first + 3):
            await pair.generator.call_split("generate", number)
            scoring.append(asyncio.create_task(pair.learner.call_split("logprobs", number)))
        return scoring

    lanes = await asyncio.gather(lane(0), lane(3))
    await asyncio.gather(*(task for tasks in lanes for task in tasks))
    assert pair.events == [
        "learner sleep",
        "generator wake",
        *["generator generate"] * 6,
        "generator sleep",
        "learner wake",
        *["learner logprobs"] * 6,
    ]


async def test_who_ends_is_put_to_sleep_no_more() -> None:
    pair = Pair()
    await pair.start()
    pair.sleepers["generator"].awake = True  # so that a second `wake` would be seen
    await pair.generator.call("stop")
    await pair.learner.call("learn")
    late = Sleeper("late", pair.events)
    await TurnWorker(late, pair.turns, "generator").call("start")
    assert pair.events[-4:] == ["generator stop", "learner learn", "learner sleep", "late start"]


async def test_a_dead_worker_holds_up_nobody() -> None:
    pair = Pair()
    await pair.start()
    dead = pair.sleepers["generator"]
    dead.raises = {method: ActorFailure("dead") for method in ("wake", "sleep", "generate")}
    with pytest.raises(ActorFailure):
        await pair.generator.call("generate")
    await pair.learner.call("learn")
    assert pair.events[-1] == "learner learn"


async def test_a_worker_that_cannot_wake_up_says_so_to_its_caller() -> None:
    pair = Pair()
    await pair.start()
    pair.sleepers["generator"].raises = {"wake": WeightSyncError("another digest")}
    with pytest.raises(WeightSyncError, match="another digest"):
        await pair.generator.call("generate")
    await pair.learner.call("learn")
    assert pair.events[-2:] == ["learner wake", "learner learn"]


async def test_sides_change_places_to_the_end_whoever_is_cancelled() -> None:
    pair = Pair()
    await pair.start()
    sleeping = asyncio.Event()
    learner = pair.sleepers["learner"]
    call = learner.call

    async def slow(method: str, *args: Any) -> Any:
        if method == "sleep":
            await sleeping.wait()
        return await call(method, *args)

    learner.call = slow  # type: ignore[method-assign]
    cancelled = asyncio.ensure_future(pair.generator.call("generate"))
    await asyncio.sleep(0.1)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    sleeping.set()
    await asyncio.wait_for(pair.learner.call("learn"), 5)  # its weights are back before it learns
    await asyncio.wait_for(pair.generator.call("generate"), 5)
