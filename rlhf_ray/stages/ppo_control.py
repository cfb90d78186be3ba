"""While PPO runs: tells others how it stands, and passes on what they ask."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rlhf_ray.cluster.control import INTERVAL_S, ControlFiles
from rlhf_ray.driver.ppo_loop import PpoLoop
from rlhf_ray.observability.progress import Bar
from rlhf_ray.roles import Generators


@asynccontextmanager
async def exchanged(
    folder: Path, loop: PpoLoop, generators: Generators, bar: Bar
) -> AsyncIterator[None]:
    """Exchange status and wishes with the files of a run until the loop has ended."""
    files = ControlFiles(folder)
    exchange = asyncio.ensure_future(_exchange(files, loop, generators, bar))
    try:
        yield
    finally:
        exchange.cancel()
        files.tell(**_standing(loop, generators, bar))


async def _exchange(files: ControlFiles, loop: PpoLoop, generators: Generators, bar: Bar) -> None:
    granted = None
    while True:
        files.tell(**_standing(loop, generators, bar))
        wish = files.asked()
        if wish.stop:
            loop.request_stop()
        if wish.num_generators is not None and wish.num_generators != granted:
            generators.scale_to(wish.num_generators)
            granted = wish.num_generators
        await asyncio.sleep(INTERVAL_S)


def _standing(loop: PpoLoop, generators: Generators, bar: Bar) -> dict[str, Any]:
    return {
        "iteration": loop.state.iteration,
        "iterations": bar.total,
        "reward": bar.values.get("reward"),
        "kl": bar.values.get("kl"),
        "version": loop.state.version,
        "seconds_per_iteration": bar.pace_s,
        "generators": tuple(generators.statuses()),
    }
