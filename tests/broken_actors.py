"""Handles of actors whose calls fail, or never end."""

import asyncio
from types import SimpleNamespace
from typing import Any

from rlhf_ray.cluster.ray_workers import RayWorker


class Scorer:
    """The class that the handles stand for."""

    def start(self) -> None: ...
    def score(self, done_at_s: float = 0.0) -> float: ...


class Broken:
    """A handle whose calls fail, or never end."""

    _actor_id = SimpleNamespace(hex=lambda: "a1")

    def __init__(self, error: Exception | None) -> None:
        self.start = self.score = SimpleNamespace(remote=self._call)
        self._error = error

    async def _call(self) -> None:
        if self._error is None:
            await asyncio.Event().wait()
        raise self._error


def broken(error: Exception | None, has_slot: bool = True) -> RayWorker:
    actor: Any = Broken(error)
    return RayWorker(
        *("generator-0", actor, 600.0, lambda *_: None),
        start_timeout_s=0.05,
        num_gpus=0.0,
        one_at_a_time=True,
        has_slot=has_slot,
    )
