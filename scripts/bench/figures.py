"""What a row measures, and how: goals, figures, and two things timed in turn."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

ROUNDS = 5
"""Fewest rounds that a figure is the median of."""
MET, MISSED, REPORTED, NOT_RUN = "met", "missed", "reported", "not run"


@dataclass(frozen=True)
class Goal:
    """The bound that a figure has to keep."""

    kind: Literal["at least", "at most"]
    bound: float

    def holds(self, value: float) -> bool:
        """Return whether the figure keeps it; one that is not a number doesn't."""
        return value >= self.bound if self.kind == "at least" else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.kind == 'at least' else '<='} {number(self.bound)}"


@dataclass(frozen=True)
class Figure:
    """A figure, with what it was computed from."""

    value: float
    low: float | None = None
    """Smallest of the rounds."""
    high: float | None = None
    details: dict[str, Any] = field(default_factory=dict)
    """What else was seen, for the JSON; names carry the unit."""

    def verdict(self, goal: Goal | None) -> str:
        """Return met, missed, or reported where there is no goal."""
        if goal is None:
            return REPORTED
        return MET if goal.holds(self.value) else MISSED

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return number(self.value)
        return f"{number(self.value)} ({number(self.low)} to {number(self.high)})"


@dataclass(frozen=True)
class InTurn:
    """Seconds of two things that were timed in turn, a pair for each round."""

    ours: Sequence[float]
    theirs: Sequence[float]

    def speed(self, **details: Any) -> Figure:
        """Return how many times as fast ours is: the medians' ratio, and the rounds' extremes."""
        ratios = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        seconds = {"ours_s": list(self.ours), "against_s": list(self.theirs)}
        value = median(self.theirs) / median(self.ours)
        return Figure(value, min(ratios), max(ratios), seconds | details)


def in_turn(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int = ROUNDS,
    step: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> InTurn:
    """Time two things in turn, after one untimed call of each.

    Which one begins changes with each round, so that a machine that slows down or warms up favours
    neither.

    Args:
        ours: the first.
        theirs: what it is compared with.
        rounds: number of times that each is timed.
        step: called after each round, the untimed one included.
        clock: in seconds.
    """
    pair = (ours, theirs)
    for call in pair:
        call()
    step()
    seconds: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds):
        for which in (0, 1) if index % 2 == 0 else (1, 0):
            began_s = clock()
            pair[which]()
            seconds[which].append(clock() - began_s)
        step()
    return InTurn(*seconds)


def of_rounds(values: Sequence[float], **details: Any) -> Figure:
    """Return the median of the rounds."""
    return Figure(median(values), min(values), max(values), {"rounds": list(values)} | details)


def number(value: float) -> str:
    """Format with three significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
