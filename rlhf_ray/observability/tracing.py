"""Spans of every actor in Chrome's trace format, which https://ui.perfetto.dev opens.

The file is the format's JSON array without its closing bracket, which the format allows: it can be
appended to, and a killed run leaves a readable trace. Each event is a line of its own.

An actor is a row. Perfetto drops a span that overlaps another one of its row without lying inside
it, as the calls of a generator do; it goes to a further row of the same name.

Source: "Trace Event Format", JSON Array Format, complete (X) and metadata (M) events.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

LANE_MEMORY = 256
"""Spans of a row that a new one is compared with; those before ended long ago."""


@dataclass(frozen=True)
class Span:
    """One stretch of work on one row."""

    row: str
    """Name of the actor, such as `policy-0`."""
    name: str
    """What it did, such as `learn`."""
    start_s: float
    """Unix time, seconds."""
    end_s: float
    """Unix time, seconds."""
    args: dict[str, Any] = field(default_factory=dict)
    """What else is known, such as `iteration`."""


class Tracer:
    """Writes spans; an existing trace is appended to. One process writes a file.

    Args:
        path: trace file.
        run_name: name of the trace's process; default: the name of the file's folder.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        path: str | Path,
        run_name: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        self._lanes: dict[str, list[_Lane]] = {}
        self._num_lanes = 0
        for thread_id, row in _keep_whole_lines(path).items():
            self._lanes.setdefault(row, []).append(_Lane(thread_id))
            self._num_lanes = max(self._num_lanes, thread_id)
        self._file = path.open("a", encoding="utf-8")
        if path.stat().st_size == 0:
            self._file.write("[\n")
            self._write_name("process_name", 0, run_name or path.resolve().parent.name)

    @contextmanager
    def span(self, row: str, name: str, **args: Any) -> Iterator[None]:
        """Record the body of the ``with`` as a span, also when it raises."""
        start_s = self._clock()
        try:
            yield
        finally:
            self.add(row, name, start_s, self._clock(), **args)

    def add(self, row: str, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """Record a span measured elsewhere.

        Args:
            row: actor name; a new one opens a new row.
            name: what was done.
            start_s: Unix time, seconds.
            end_s: Unix time, seconds.
            args: shown with the span; the report's timeline reads ``iteration``.
        """
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
        """Thread id of the first lane of a row that has room for a span."""
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
        """Close the file."""
        self._file.close()

    def _write_name(self, kind: str, thread_id: int, name: str) -> None:
        self._write({"ph": "M", "name": kind, "pid": 1, "tid": thread_id, "args": {"name": name}})

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event) + ",\n")
        self._file.flush()


class _Lane:
    """A row of the trace, in which spans lie beside or inside each other."""

    def __init__(self, thread_id: int) -> None:
        self.thread_id = thread_id
        self._spans: deque[tuple[int, int]] = deque(maxlen=LANE_MEMORY)

    def takes(self, start_us: int, end_us: int) -> bool:
        """Take a span, unless it overlaps another one in part."""
        for start, end in reversed(self._spans):
            apart = end <= start_us or end_us <= start
            inside = (start_us <= start and end <= end_us) or (start <= start_us and end_us <= end)
            if not (apart or inside):
                return False
        self._spans.append((start_us, end_us))
        return True


def read_spans(path: str | Path) -> list[Span]:
    """Spans of a trace in the order written; none where the file is absent."""
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


def phase_totals(path: str | Path) -> dict[str, dict[str, float]]:
    """Seconds that each row spent in each kind of span: ``{row: {name: seconds}}``.

    A span's time is its own: what spans nested in it on the same row took is theirs, so a row's
    sum is at most the time that it was busy.
    """
    totals: dict[str, dict[str, float]] = {}
    spans = sorted(read_spans(path), key=lambda span: (span.row, span.start_s, -span.end_s))
    for row, row_spans in groupby(spans, key=lambda span: span.row):
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


def _read_events(path: Path) -> list[dict[str, Any]]:
    """Events of a trace; a line torn by a kill is left out."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            event = json.loads(line.rstrip(","))
        except json.JSONDecodeError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _row_names(events: list[dict[str, Any]]) -> dict[int, str]:
    return {
        event["tid"]: event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == "thread_name"
    }


def _keep_whole_lines(path: Path) -> dict[int, str]:
    """Cut a torn last line off an existing trace; return its rows' names by thread id."""
    if not path.exists():
        return {}
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)
    return _row_names(_read_events(path))
