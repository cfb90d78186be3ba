"""A watchdog: where a run has committed nothing for long, it keeps a stack of every process.

It looks from a thread of its own, because the driver's event loop may be what hangs.
"""

import asyncio
import faulthandler
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import median

import ray

from rlhf_ray.cluster.nodes import actor_stacks
from rlhf_ray.config import Config
from rlhf_ray.config.guards import StallGuard
from rlhf_ray.driver.ppo_loop import PpoLoop
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.observability.repeated import repeated
from rlhf_ray.runs.control import ControlFiles

INTERVAL_S = 2.0
"""Between two looks at the number of commits."""
WINDOW = 50
"""Latest iterations whose median is the run's pace."""
COLLECT_S = 30.0
"""Longest time for the stacks of all nodes to arrive."""


class Watchdog:
    """Compares the time since the last commit with the run's own pace."""

    def __init__(
        self,
        guard: StallGuard,
        pace: Iterable[float],
        committed: Callable[[], int],
        keep: Callable[[], Path],
        report: Callable[[str, dict[str, float]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            guard: its settings.
            pace: seconds of the run's latest iterations, of earlier processes.
            committed: returns the number of iterations that are committed.
            keep: writes the stacks; returns their folder.
            report: called where the run stalls, with a text and its numbers, and with an empty
                text when it commits again.
            clock: seconds, monotonic.
        """
        self._guard = guard
        self._pace = deque(pace, maxlen=WINDOW)
        self._committed = committed
        self._keep = keep
        self._report = report
        self._clock = clock
        self._iteration = committed()
        self._since_s = clock()
        self._is_stalled = False

    @property
    def bound_s(self) -> float:
        """Longest time without a commit; the first iterations of a run have no pace yet."""
        usual_s = self._guard.factor * median(self._pace) if self._pace else self._guard.first_s
        return max(usual_s, self._guard.min_s)

    def look(self) -> None:
        """Count a commit, or keep the stacks where one is overdue."""
        iteration, now_s = self._committed(), self._clock()
        waited_s = now_s - self._since_s
        if iteration != self._iteration:
            self._pace.append(waited_s)
            self._iteration, self._since_s = iteration, now_s
            if self._is_stalled:
                self._is_stalled = False
                self._report("", {})
        elif waited_s > self.bound_s and not self._is_stalled:
            self._is_stalled = True
            where: object
            try:
                where = self._keep()
            except OSError as error:
                where = f"no folder ({error.strerror or error})"
            usual = f"{median(self._pace):.3g} s" if self._pace else "an unknown time"
            self._report(
                f"Nothing was committed for {waited_s:.0f} s; an iteration usually takes {usual}, "
                f"and the bound is {self.bound_s:.0f} s (guards.stall). The stacks of all "
                f"processes are in {where}: look for what they wait for. The run continues; a "
                "call that hangs fails by its own deadline",
                {"waited_s": waited_s, "bound_s": self.bound_s},
            )


@contextmanager
def watched(
    config: Config, folder: Path, loop: PpoLoop, recorder: Recorder, say: Callable[[str], None]
) -> Iterator[None]:
    """Have a watchdog look after a loop while the block runs, unless its guard is off."""
    guard, running = config.guards.stall, asyncio.get_running_loop()
    files = ControlFiles(folder)

    def report(text: str, numbers: dict[str, float]) -> None:
        recorder.stalled(bool(text))
        files.update(message=text or None)
        if text:
            iteration = loop.state.iteration
            recorder.warning(
                {
                    "iteration": iteration,
                    "guard": "stall",
                    "action": "warn",
                    "numbers": numbers,
                    "text": text,
                }
            )
            say(f"Warning: ppo, after iteration {iteration}, stall: {text}")

    pace = [record.get("timing_s/iteration") for record in recorder.history()[-WINDOW:]]
    watchdog = Watchdog(
        guard,
        [seconds for seconds in pace if seconds],
        lambda: loop.state.iteration,
        lambda: keep_stacks(folder / "stacks", running),
        report,
    )
    # Collecting stacks takes longer than a run that is told to end may.
    looking = repeated(watchdog.look, INTERVAL_S, "watchdog", join_s=1.0)
    with looking if guard.factor else nullcontext():
        yield


def keep_stacks(folder: Path, loop: asyncio.AbstractEventLoop) -> Path:
    """Write the stacks of the driver and of every actor of the run into a new folder."""
    target = folder / time.strftime("%Y-%m-%d_%H-%M-%S")
    target.mkdir(parents=True, exist_ok=True)
    found: Mapping[str, str] = {"driver": _own_stacks(loop)}
    _write(target, found)  # first, because a cluster that hangs may not answer
    if ray.is_initialized():
        try:
            found = actor_stacks(COLLECT_S)
        except Exception as error:  # whatever hangs or broke: the driver's stacks are kept
            found = {"actors": f"The cluster did not answer: {error}\n"}
        _write(target, found)
    return target


def _write(folder: Path, found: Mapping[str, str]) -> None:
    for name, text in found.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")


def _own_stacks(loop: asyncio.AbstractEventLoop) -> str:
    """Return the stacks of this process's threads, and of what its event loop waits for."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0, 2)
        file.write("\nTasks of the event loop:\n")
        with suppress(RuntimeError):  # tasks come and go while this thread reads them
            for task in asyncio.all_tasks(loop):
                task.print_stack(file=file)
        file.seek(0)
        return file.read()
