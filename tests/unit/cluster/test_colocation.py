"""Two groups on one GPU: which is awake when."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from rlhf_ray.cluster.colocation import ColocatedWorker, Colocation
from rlhf_ray.errors import ActorFailure, WeightSyncError
from rlhf_ray.roles import GeneratorProcess, LearnerProcess, PolicyProcess, Process


class Sleeper:
    """A worker that knows whether it is awake, and writes down what it is asked."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.name = name
        self.awake = True
        self.raises: dict[str, Exception] = {}
        self._events = events

    async def address(self) -> str:
        return "127.0.0.1"

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        method = function.__name__
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

    async def call_split(self, method: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        return await self.call(method, *args), None


class Pair:
    """A generator and a learner on one GPU."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.colocation = Colocation()
        self.sleepers = {name: Sleeper(name, self.events) for name in ("generator", "learner")}
        self.generator, self.learner = (
            ColocatedWorker(worker, self.colocation, name) for name, worker in self.sleepers.items()
        )

    async def start(self) -> None:
        await asyncio.gather(self.generator.call(Process.start), self.learner.call(Process.start))


async def test_one_starts_after_the_other_is_asleep() -> None:
    pair = Pair()
    await pair.start()
    assert pair.events == ["generator start", "generator sleep", "learner start"]


async def test_a_call_waits_until_the_other_group_is_idle() -> None:
    pair = Pair()
    await pair.start()
    pair.events.clear()

    async def lane(first: int) -> list[asyncio.Task[Any]]:
        """Three shards one after the other, each scored as soon as it is there."""
        scoring = []
        for number in range(first, first + 3):
            await pair.generator.call_split(GeneratorProcess.generate, number)
            scoring.append(
                asyncio.create_task(pair.learner.call_split(PolicyProcess.logprobs, number))
            )
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


async def test_an_ended_worker_is_never_put_to_sleep() -> None:
    pair = Pair()
    await pair.start()
    pair.sleepers["generator"].awake = True  # so that a second `wake` would be seen
    await pair.generator.call(GeneratorProcess.stop)
    await pair.learner.call(LearnerProcess.learn)
    late = Sleeper("late", pair.events)
    await ColocatedWorker(late, pair.colocation, "generator").call(Process.start)
    assert pair.events[-4:] == ["generator stop", "learner learn", "learner sleep", "late start"]


async def test_a_dead_worker_does_not_block_a_swap() -> None:
    pair = Pair()
    await pair.start()
    dead = pair.sleepers["generator"]
    dead.raises = {method: ActorFailure("dead") for method in ("wake", "sleep", "generate")}
    with pytest.raises(ActorFailure):
        await pair.generator.call(GeneratorProcess.generate)
    await pair.learner.call(LearnerProcess.learn)
    assert pair.events[-1] == "learner learn"


async def test_a_failed_wake_reaches_the_caller() -> None:
    pair = Pair()
    await pair.start()
    pair.sleepers["generator"].raises = {"wake": WeightSyncError("another digest")}
    with pytest.raises(WeightSyncError, match="another digest"):
        await pair.generator.call(GeneratorProcess.generate)
    await pair.learner.call(LearnerProcess.learn)
    assert pair.events[-2:] == ["learner wake", "learner learn"]


async def test_a_swap_completes_when_its_caller_is_cancelled() -> None:
    pair = Pair()
    await pair.start()
    sleeping = asyncio.Event()
    learner = pair.sleepers["learner"]
    call = learner.call

    async def slow(method: Callable[..., Any], *args: Any) -> Any:
        if method.__name__ == "sleep":
            await sleeping.wait()
        return await call(method, *args)

    learner.call = slow  # type: ignore[method-assign]
    cancelled = asyncio.ensure_future(pair.generator.call(GeneratorProcess.generate))
    await asyncio.sleep(0.1)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    sleeping.set()
    await asyncio.wait_for(
        pair.learner.call(LearnerProcess.learn), 5
    )  # its weights are back before it learns
    await asyncio.wait_for(pair.generator.call(GeneratorProcess.generate), 5)


async def test_a_worker_that_failed_to_wake_is_not_called_half_awake() -> None:
    """It lives, so its call would compute on the wrong device, or wait for its group forever."""
    pair = Pair()
    await pair.start()
    pair.sleepers["generator"].raises = {"wake": ActorFailure("CUDA out of memory")}
    for _ in range(2):
        with pytest.raises(ActorFailure, match="CUDA out of memory"):
            await pair.generator.call(GeneratorProcess.generate)
    assert "generator generate" not in pair.events
    pair.generator.leave()
    late = Sleeper("late", pair.events)
    await ColocatedWorker(late, pair.colocation, "generator").call(Process.start)
    assert pair.events[-1] == "late start"
