import asyncio
from collections.abc import Awaitable
from typing import Any

import pytest
from ray.autoscaler._private import commands

from rlhf_ray.cluster import ray_workers
from rlhf_ray.cluster.ray_workers import RayWorker


class Method:
    """An actor's method that answers after as many seconds as it is told."""

    def __init__(self, clock: "Clock") -> None:
        self._clock = clock

    def remote(self, done_at_s: float) -> Awaitable[float]:
        return self._clock.reaches(done_at_s)


class Clock:
    """Unix time of a test."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def time(self) -> float:
        return self.now_s

    async def reaches(self, then_s: float) -> float:
        for _ in range(10 * int(then_s - self.now_s)):  # whoever waits for it reads the clock first
            await asyncio.sleep(0)
        self.now_s = then_s
        return then_s


class Actor:
    """A handle with one method."""

    def __init__(self, clock: Clock) -> None:
        self.score = Method(clock)


@pytest.mark.parametrize(
    ("one_at_a_time", "expected"),
    [
        (True, [(100.0, 104.0), (104.0, 107.0)]),
        (False, [(100.0, 104.0), (100.0, 107.0)]),
    ],
)
async def test_waiting_for_the_call_before_is_no_work(
    monkeypatch: pytest.MonkeyPatch, one_at_a_time: bool, expected: list[tuple[float, float]]
) -> None:
    clock, calls = Clock(), []
    monkeypatch.setattr(ray_workers, "time", clock)

    def on_call(_name: str, _method: str, start_s: float, end_s: float) -> None:
        calls.append((start_s, end_s))

    actor: Any = Actor(clock)
    worker = RayWorker(
        "reward-0",
        actor,
        600.0,
        on_call,
        start_timeout_s=300.0,
        num_gpus=0.0,
        one_at_a_time=one_at_a_time,
    )
    await asyncio.gather(worker.call("score", 104.0), worker.call("score", 107.0))
    assert calls == expected


def test_room_is_asked_for_on_nodes_with_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Ray's own function takes it, which checks what it is given."""
    asked: list[Any] = []
    monkeypatch.setattr(commands, "request_resources", lambda *request: asked.append(request))
    ray_workers.ask_for_room([{"CPU": 1.0, "GPU": 1}, {"CPU": 1.0}], [{"role": "train"}, {}])
    ray_workers.ask_for_room([], [])
    bundles = [{"CPU": 1.0, "GPU": 1}, {"CPU": 1.0}]
    assert asked == [(None, bundles, [{"role": "train"}, {}]), (None, [], [])]
