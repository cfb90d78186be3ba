"""Progress of long work: a live bar on a terminal, a plain line every few seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from rlhf_ray.secrecy import printable, redacted

PLAIN_INTERVAL_S = 10.0
"""Minimum seconds between two plain lines."""


class View(Protocol):
    """Displays the progress of a stage."""

    def update(self, bar: "Bar") -> None:
        """Show the bar's current state."""
        ...

    def close(self) -> None:
        """Remove the display; called once, before the stage's final line."""
        ...


class Bar:
    """The progress of one stage; created by `Progress.stage`."""

    def __init__(
        self, name: str, total: int | None, unit: str, done: int, clock: Callable[[], float]
    ) -> None:
        self.name = name
        self.total = total
        self.done = done
        self.view: View | None = None
        self._unit = unit
        self._first = done
        self._clock = clock
        self._start_s = self._throughput_start_s = clock()
        self.values: dict[str, float] = {}
        """The latest of each value shown."""

    def advance(self, num_units: int = 1, **values: float) -> None:
        """Count ``num_units`` more as done, and show the latest ``values``."""
        if self._throughput_start_s == self._start_s:
            # The first units include start-up (loading, compiling), so that they would make the
            # estimate far too long: throughput is measured from their end.
            self._first, self._throughput_start_s = self.done + num_units, self._clock()
        self.done += num_units
        self.values.update(values)
        self.changed()

    def restart(self, total: int | None, unit: str) -> None:
        """Begin another part of the same stage, with its own unit and count."""
        self.total, self._unit = total, unit
        self.done = self._first = 0
        self._throughput_start_s = self._start_s
        self.changed()

    def changed(self) -> None:
        """Show the current state in the view and to all watchers."""
        for show in [self.view.update, *_watchers] if self.view is not None else _watchers:
            show(self)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stage began in this process."""
        return self._clock() - self._start_s

    @property
    def seconds_per_unit(self) -> float | None:
        """Mean seconds per unit since the first ones; None before there is an estimate."""
        num_here = self.done - self._first
        return (self._clock() - self._throughput_start_s) / num_here if num_here > 0 else None

    @property
    def eta_s(self) -> float | None:
        """Estimated seconds left; None before there is an estimate."""
        seconds_per_unit = self.seconds_per_unit
        if self.total is None or seconds_per_unit is None:
            return None
        return max(0, self.total - self.done) * seconds_per_unit

    def counted(self) -> str:
        """Return the count, such as ``12/60 iterations``."""
        number = self.total if self.total is not None else self.done
        units = self._unit if number == 1 else f"{self._unit}s"
        return f"{self.done} {units}" if self.total is None else f"{self.done}/{self.total} {units}"

    def shown_values(self) -> str:
        """Return the values, such as ``, reward 0.51, kl 1.2``."""
        return "".join(f", {name} {value:.3g}" for name, value in self.values.items())

    def line(self) -> str:
        """Return a line: ``ppo 12/60 iterations, 20%, 0:41 elapsed, ETA 2:41, reward 0.51``."""
        share = f", {self.done / self.total:.0%}" if self.total else ""
        eta = f", ETA {clock_time(self.eta_s)}" if self.eta_s is not None else ""
        return (
            f"{self.name} {self.counted()}{share}, {clock_time(self.elapsed_s)} elapsed{eta}"
            f"{self.shown_values()}"
        )


_watchers: list[Callable[[Bar], None]] = []


@contextmanager
def watched_by(watcher: Callable[[Bar], None]) -> Iterator[None]:
    """Report the progress of every stage of this process to a watcher as well."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


class Progress:
    """Shows a run's progress on a terminal or in a log.

    Args:
        stages: names of all stages of the run in order, for headings such as ``[3/7] sft``.
        stream: where to write; default: standard output.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        stages: Sequence[str] = (),
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages = tuple(stages)
        shown: TextIO = stream or sys.stdout
        # rich takes FORCE_COLOR for a terminal, and a live bar would fill a job's log.
        self._console = _LastingConsole(
            file=shown, highlight=False, soft_wrap=True, force_terminal=shown.isatty()
        )
        self._clock = clock

    @contextmanager
    def stage(
        self, name: str, total: int | None = None, unit: str = "step", done: int = 0
    ) -> Iterator[Bar]:
        """Show a stage from its heading to its final line.

        Args:
            name: stage name.
            total: units of work, or None where unknown.
            unit: name of a unit of work, in the singular.
            done: units already done when a run resumes.
        """
        heading = self._heading(name)
        self.say(heading)
        bar = Bar(name, total, unit, done, self._clock)
        bar.view = (
            _LiveView(self._console, bar)
            if self._console.is_terminal
            else _PlainView(self.say, self._clock)
        )
        bar.changed()
        outcome = "stopped"
        try:
            yield bar
            outcome = "done"
        finally:
            bar.view.close()
            counted = f": {bar.counted()}" if bar.done or bar.total else ""
            self.say(
                f"{heading} {outcome}{counted} in {clock_time(bar.elapsed_s)}{bar.shown_values()}"
            )

    def say(self, text: str) -> None:
        """Print a line, above the live bar where there is one."""
        with suppress(OSError, ValueError):  # a stream of a caller's that is closed by now
            self._console.print(printable(redacted(text)), markup=False)
            self._console.file.flush()

    def _heading(self, name: str) -> str:
        if name not in self._stages:
            return name
        return f"[{self._stages.index(name) + 1}/{len(self._stages)}] {name}"


class _LastingConsole(Console):
    """A console on which a pipe without a reader ends nothing; rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class _PlainView:
    """Prints the bar's line at most every `PLAIN_INTERVAL_S`."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._say = say
        self._clock = clock
        self._last_s = clock()

    def update(self, bar: Bar) -> None:
        now_s = self._clock()
        if now_s - self._last_s >= PLAIN_INTERVAL_S:
            self._last_s = now_s
            self._say(bar.line())

    def close(self) -> None:
        """Do nothing: there is no display to remove."""


class _LiveView:
    """A live bar that disappears at the end."""

    def __init__(self, console: Console, bar: Bar) -> None:
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[counted]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rest]}", markup=False),
        ]
        self._progress = RichProgress(*columns, console=console, transient=True)
        self._task = self._progress.add_task(
            bar.name, total=bar.total, completed=bar.done, counted=bar.counted(), rest=""
        )
        self._progress.start()

    def update(self, bar: Bar) -> None:
        eta = f"ETA {clock_time(bar.eta_s)}" if bar.eta_s is not None else ""
        self._progress.update(
            self._task,
            total=bar.total,
            completed=bar.done,
            counted=bar.counted(),
            rest=(eta + bar.shown_values()).removeprefix(", "),
        )

    def close(self) -> None:
        self._progress.stop()


def clock_time(seconds: float) -> str:
    """Format a duration as ``0:41``, ``12:05`` or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
