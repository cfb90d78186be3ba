"""While PPO runs: tells others how it stands, and passes on what they ask."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from rlhf_ray.driver.ppo_loop import PpoLoop
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.observability.progress import Bar
from rlhf_ray.roles import Generators
from rlhf_ray.runs.control import INTERVAL_S, ControlFiles


@asynccontextmanager
async def exchanged(
    folder: Path,
    loop: PpoLoop,
    generators: Generators,
    bar: Bar,
    recorder: Recorder,
    tell: Callable[[str], None],
) -> AsyncIterator[None]:
    """Exchange status and wishes with the files of a run until the loop has ended."""
    files = ControlFiles(folder)
    exchange = asyncio.ensure_future(_exchange(files, loop, generators, bar, recorder, tell))
    try:
        yield
    finally:
        exchange.cancel()
        files.tell(**_standing(loop, generators, bar))


async def _exchange(
    files: ControlFiles,
    loop: PpoLoop,
    generators: Generators,
    bar: Bar,
    recorder: Recorder,
    tell: Callable[[str], None],
) -> None:
    num_scaled, trouble = 0, None
    while True:
        files.tell(**_standing(loop, generators, bar))
        try:
            recorder.generators(generators.report(), [each.name for each in generators.statuses()])
            wish = files.asked()
            if wish.stop:
                loop.request_stop()
            if wish.num_generators is not None and wish.scalings != num_scaled:
                generators.scale_to(wish.num_generators)
                num_scaled = wish.scalings
        except Exception as error:  # storage or cluster that does not answer just now
            if str(error) != trouble:
                tell(f"What was asked of the run could not be done, and is tried again: {error}")
            trouble = str(error)
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
