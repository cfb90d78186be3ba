"""Spans of every actor in Chrome's trace format, which https://ui.perfetto.dev opens.

The file is a JSON array with one event per line, written as events arrive and completed by `close`.
The format allows the closing bracket to be missing, so the trace of a killed run opens as well.

An actor is a row. Perfetto drops a span that partly overlaps another one of its row, as the calls
of a generator do; such a span goes to another row of the same name.

Source: "Trace Event Format", JSON Array Format, complete (X) and metadata (M) events.
"""

import json
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rlhf_ray.disk import AppendedFile

_BEGAN = time.time() - time.monotonic()

LANE_MEMORY = 256
"""Latest spans of a row that a new one is compared with; older ones ended long ago."""


def unix_now() -> float:
    """Return the Unix time, seconds, by a clock that never jumps.

    It is the system's time when this process began, and what has passed since.
    """
    return _BEGAN + time.monotonic()


@dataclass(frozen=True)
class Span:
    """One piece of work on one row."""

    row: str
    """Name of the actor, such as `policy-0`."""
    name: str
    """What it did, such as `learn`."""
    start_s: float
    """Unix time, seconds."""
    end_s: float
    """Unix time, seconds."""
    args: Mapping[str, int] = field(default_factory=dict)
    """Further numbers, such as `iteration`."""


_Event = dict[str, Any]
"""One event in Chrome's format."""


class Tracer:
    """Writes spans to a new or an existing trace. Only one process may write a file.

    Args:
        path: trace file.
        run_name: name of the trace's process; default: the name of the file's folder.
    """

    def __init__(self, path: str | Path, run_name: str | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lanes: dict[str, list[_Lane]] = {}
        self._num_lanes = 0
        events = _reopen(path)
        ends_us = (event["ts"] + event["dur"] for event in events if event["ph"] == "X")
        self.seen_at = max(ends_us, default=0) / 1e6
        """Unix time at which the last span of earlier processes ended; 0 without any."""
        for thread_id, row in _row_names(events).items():
            self._lanes.setdefault(row, []).append(_Lane(thread_id))
            self._num_lanes = max(self._num_lanes, thread_id)
        self._file = AppendedFile(path)
        self._is_closed = False
        # Separators come before an event, so that closing only appends.
        self._separator = ",\n" if events else "[\n"
        if not events:
            self._write_name("process_name", 0, run_name or path.resolve().parent.name)

    def add(self, row: str, name: str, start_s: float, end_s: float, **args: int) -> None:
        """Record a span, Unix seconds; the report's timeline reads the argument ``iteration``."""
        start_us, end_us = round(start_s * 1e6), round(end_s * 1e6)
        self._write(
            {
                "ph": "X",
                "name": name,
                "pid": 1,
                "tid": self._lane(row, start_us, end_us),
                "ts": start_us,
                "dur": end_us - start_us,
                "args": args,
            }
        )

    def _lane(self, row: str, start_us: int, end_us: int) -> int:
        """Return the thread id of the row's first lane in which the span fits."""
        lanes = self._lanes.setdefault(row, [])
        for lane in lanes:
            if lane.takes(start_us, end_us):
                return lane.thread_id
        self._num_lanes += 1
        lane = _Lane(self._num_lanes)
        lane.takes(start_us, end_us)
        lanes.append(lane)
        self._write_name("thread_name", lane.thread_id, row)
        return lane.thread_id

    def close(self) -> None:
        """Complete the JSON array and close the file."""
        if not self._is_closed:
            self._is_closed = True
            self._file.write("\n]\n")
            self._file.close()

    def _write_name(self, kind: str, thread_id: int, name: str) -> None:
        self._write({"ph": "M", "name": kind, "pid": 1, "tid": thread_id, "args": {"name": name}})

    def _write(self, event: _Event) -> None:
        self._file.write(self._separator + json.dumps(event))
        self._separator = ",\n"


class _Lane:
    """A row of the trace, in which spans lie side by side or nested."""

    def __init__(self, thread_id: int) -> None:
        self.thread_id = thread_id
        self._spans: deque[tuple[int, int]] = deque(maxlen=LANE_MEMORY)

    def takes(self, start_us: int, end_us: int) -> bool:
        """Add a span and return True, unless it partly overlaps another one."""
        for start, end in reversed(self._spans):
            apart = end <= start_us or end_us <= start
            inside = (start_us <= start and end <= end_us) or (start <= start_us and end_us <= end)
            if not (apart or inside):
                return False
        self._spans.append((start_us, end_us))
        return True


class BusyTime:
    """Share of time in which each actor was busy; overlapping calls count once."""

    def __init__(self, since_s: float) -> None:
        self._since_s = since_s
        self._calls: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, actor: str, start_s: float, end_s: float) -> None:
        """Add a call that an actor worked on, Unix seconds."""
        self._calls[actor].append((start_s, end_s))

    def shares(self, now_s: float) -> dict[str, float]:
        """Return the busy share of every known actor since the last call of this method."""
        length_s = max(now_s - self._since_s, 1e-9)
        shares = {
            actor: self._covered_s(sorted(calls)) / length_s for actor, calls in self._calls.items()
        }
        self._since_s = now_s
        for calls in self._calls.values():
            calls.clear()
        return shares

    def forget(self, actor: str) -> None:
        """Drop an actor that has left."""
        self._calls.pop(actor, None)

    def actors(self) -> list[str]:
        """Return the names of the known actors."""
        return list(self._calls)

    def _covered_s(self, calls: list[tuple[float, float]]) -> float:
        covered_s, reached_s = 0.0, self._since_s
        for start_s, end_s in calls:
            covered_s += max(0.0, end_s - max(start_s, reached_s))
            reached_s = max(reached_s, end_s)
        return covered_s


def read_spans(path: str | Path) -> list[Span]:
    """Return the spans of a trace in the order written; none if the file is absent."""
    events = _read_events(Path(path))
    rows = _row_names(events)
    return [
        Span(
            row=rows.get(event["tid"], str(event["tid"])),
            name=event["name"],
            start_s=event["ts"] / 1e6,
            end_s=(event["ts"] + event["dur"]) / 1e6,
            args=event["args"],
        )
        for event in events
        if event["ph"] == "X"
    ]


def phase_totals(spans: Iterable[Span]) -> dict[str, dict[str, float]]:
    """Return the seconds of each row by kind of span: ``{row: {name: seconds}}``.

    The time of nested spans is not counted again in the span around them, so that a row's sum is at
    most the time that it was busy.
    """
    totals: dict[str, dict[str, float]] = {}
    in_order = sorted(spans, key=lambda span: (span.row, span.start_s, -span.end_s))
    for row, row_spans in groupby(in_order, key=lambda span: span.row):
        own = totals.setdefault(row, {})
        open_spans: list[Span] = []
        for span in row_spans:
            while open_spans and open_spans[-1].end_s < span.end_s:
                open_spans.pop()
            duration_s = span.end_s - span.start_s
            if open_spans:
                own[open_spans[-1].name] -= duration_s
            own[span.name] = own.get(span.name, 0.0) + duration_s
            open_spans.append(span)
    return totals


def _read_events(path: Path) -> list[_Event]:
    """Return the events of a trace, but for a line torn by a kill."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [event for line in file if (event := _parsed(line)) is not None]


def _parsed(line: bytes) -> _Event | None:
    """Return a line's event; None for a bracket, a torn line or what is no event."""
    try:
        event = json.loads(line.rstrip(b",\n").decode())
    except (ValueError, RecursionError):
        return None
    match event:
        case {"ph": "X", "name": str(), "tid": int(), "args": dict(), "ts": ts, "dur": dur}:
            return event if _is_time(ts) and _is_time(dur) else None
        case {"ph": "M", "name": str(), "tid": int(), "args": {"name": str()}}:
            return event
    return None


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e18  # not NaN either


def _row_names(events: list[_Event]) -> dict[int, str]:
    return {
        event["tid"]: event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == "thread_name"
    }


def _reopen(path: Path) -> list[_Event]:
    """Cut an existing trace back to the end of its last whole event; return its events."""
    if not path.exists():
        return []
    events, start, end = [], 0, 0
    with path.open("r+b") as file:
        for line in file:
            if (event := _parsed(line)) is not None:
                events.append(event)
                end = start + len(line.rstrip(b",\n"))
            start += len(line)
        file.truncate(end)
    return events
