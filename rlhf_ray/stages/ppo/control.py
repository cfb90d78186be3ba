"""Write the status of a PPO run for others, and carry out their requests, while it runs."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from rlhf_ray import interruption
from rlhf_ray.driver.ppo_loop import PpoLoop
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.observability.progress import Bar
from rlhf_ray.roles import Generators
from rlhf_ray.runs.control import INTERVAL_S, ControlFiles


@asynccontextmanager
async def controlled(
    folder: Path,
    loop: PpoLoop,
    generators: Generators,
    bar: Bar,
    recorder: Recorder,
    say: Callable[[str], None],
) -> AsyncIterator[None]:
    """Write the status and serve requests, through the run's control files, until the loop ends.

    A signal interrupts the loop; work that doesn't end in time, or may not, is cancelled.
    """
    files = ControlFiles(folder)
    running, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def stop(is_late: bool) -> None:
        is_now = is_late or files.requested().now
        running.call_soon_threadsafe(task.cancel if is_now else loop.interrupt)

    def write_status() -> None:
        files.update(
            iteration=loop.state.iteration,
            iterations=bar.total,
            reward=bar.values.get("reward"),
            kl=bar.values.get("kl"),
            version=loop.state.version,
            seconds_per_iteration=bar.seconds_per_unit,
            restarts=dict(recorder.outages.restarts),
            effective_time_ratio=loop.time.ratio,
            generators=tuple(generators.statuses()),
        )

    async def exchange() -> None:
        num_scaled, last_error = 0, None
        while True:
            write_status()
            try:
                names = [each.name for each in generators.statuses()]
                recorder.generators(generators.report(), names)
                num_scaled = _serve_request(files, loop, generators, num_scaled)
            except Exception as error:  # storage or a cluster that does not answer just now
                if str(error) != last_error:
                    say(f"A request to the run failed and will be tried again: {error}")
                last_error = str(error)
            await asyncio.sleep(INTERVAL_S)

    exchanging = asyncio.ensure_future(exchange())
    try:
        with interruption.deferred(stop):
            yield
    finally:
        exchanging.cancel()
        write_status()


def _serve_request(
    files: ControlFiles, loop: PpoLoop, generators: Generators, num_scaled: int
) -> int:
    """Stop or scale as requested; returns how many requests to scale have been served."""
    request = files.requested()
    if request.stop:
        loop.request_stop()
    # Counted, not compared: the same number may be requested again after an autoscaler changed it.
    if request.num_generators is not None and request.scalings != num_scaled:
        generators.scale_to(request.num_generators)
    return request.scalings
