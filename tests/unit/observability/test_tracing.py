import itertools
import json
import time
from pathlib import Path

import pytest

from rlhf_ray.observability.tracing import (
    BusyTime,
    Span,
    Tracer,
    phase_totals,
    read_spans,
    unix_now,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "demo" / "trace.json"


def test_a_clock_that_is_set_changes_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert abs(unix_now() - time.time()) < 60
    began = unix_now()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= unix_now() - began < 60


def test_the_trace_of_an_ended_run_is_whole_json(path: Path):
    tracer = Tracer(path)
    tracer.add("policy-0", "learn", 100.0, 101.5, iteration=3)
    tracer.close()
    tracer.close()
    assert json.loads(path.read_text()) == [
        {"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "demo"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "policy-0"}},
        {
            "ph": "X",
            "name": "learn",
            "pid": 1,
            "tid": 1,
            "ts": 100_000_000,
            "dur": 1_500_000,
            "args": {"iteration": 3},
        },
    ]


def test_the_trace_of_a_killed_run_lacks_only_its_bracket_and_can_be_read(path: Path):
    tracer = Tracer(path)
    tracer.add("policy-0", "learn", 100.0, 101.5, iteration=3)
    tracer.add("critic-0", "learn", 100.0, 102.0, iteration=3)
    text = path.read_text()
    assert [event["ph"] for event in json.loads(text + "]")] == ["M", "M", "X", "M", "X"]
    learn = Span("policy-0", "learn", 100.0, 101.5, {"iteration": 3})
    assert read_spans(path) == [learn, Span("critic-0", "learn", 100.0, 102.0, {"iteration": 3})]
    path.write_text(text[:-20])
    assert read_spans(path) == [learn]


def test_a_resumed_run_continues_the_array_of_an_ended_one(path: Path):
    for start in (0.0, 10.0, 20.0):
        tracer = Tracer(path)
        tracer.add("policy-0", "learn", start, start + 1)
        tracer.close()
    events = json.loads(path.read_text())
    assert [event["ph"] for event in events] == ["M", "M", "X", "X", "X"]
    assert [span.start_s for span in read_spans(path)] == [0.0, 10.0, 20.0]


def test_a_trace_whose_lines_end_in_commas_is_continued(path: Path):
    path.parent.mkdir()
    first = {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "policy-0"}}
    path.write_text(f"[\n{json.dumps(first)},\n")
    tracer = Tracer(path)
    tracer.add("policy-0", "learn", 0.0, 1.0)
    tracer.close()
    assert [event["ph"] for event in json.loads(path.read_text())] == ["M", "X"]


def test_a_resumed_trace_keeps_its_rows_and_drops_a_torn_event(path: Path):
    first = Tracer(path)
    first.add("policy-0", "learn", 0.0, 1.0)
    first.add("critic-0", "learn", 0.0, 2.0)
    first.close()
    with path.open("a") as file:
        file.write(',\n{"ph": "X", "na')
    second = Tracer(path)
    second.add("critic-0", "learn", 5.0, 6.0)
    second.add("generator-0", "generate", 5.0, 6.0)
    second.close()
    events = json.loads(path.read_text())
    names = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert names == ["demo", "policy-0", "critic-0", "generator-0"]
    assert [span.row for span in read_spans(path)] == [
        "policy-0",
        "critic-0",
        "critic-0",
        "generator-0",
    ]


def test_totals_count_nested_time_once(path: Path):
    tracer = Tracer(path)
    # iteration 0..10 holds learn 1..4 (which holds commit 2..3) and learn 4..6: own times
    # iteration 10 - 3 - 2 = 5, learn (3 - 1) + 2 = 4, commit 1. Written children first.
    tracer.add("driver", "commit", 2.0, 3.0)
    tracer.add("driver", "learn", 1.0, 4.0)
    tracer.add("driver", "learn", 4.0, 6.0)
    tracer.add("driver", "iteration", 0.0, 10.0)
    tracer.add("policy-0", "learn", 0.5, 0.75)
    assert phase_totals(read_spans(path)) == {
        "driver": {"iteration": 5.0, "learn": 4.0, "commit": 1.0},
        "policy-0": {"learn": 0.25},
    }


def test_a_missing_trace_has_no_totals(path: Path):
    assert phase_totals(read_spans(path)) == {}


def lanes(path: Path) -> dict[int, list[tuple[float, float]]]:
    """Spans of each thread, (start, end) in microseconds."""
    found: dict[int, list[tuple[float, float]]] = {}
    for event in json.loads(path.read_text().removesuffix("\n]\n") + "]"):
        if event["ph"] == "X":
            found.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    return found


def test_spans_of_one_actor_that_overlap_lie_in_lanes_of_the_same_name(path: Path):
    tracer = Tracer(path)
    for start, end in [(0, 4), (2, 5), (4, 8), (5, 9), (3, 10), (0, 20)]:
        tracer.add("generator-0", "generate", start, end)
    for spans in lanes(path).values():
        for (a, b), (c, d) in itertools.combinations(spans, 2):
            apart, inside = b <= c or d <= a, (a <= c and d <= b) or (c <= a and b <= d)
            assert apart or inside
    # 3..10 overlaps spans of both lanes in part; 0..20 holds those of the first.
    assert [len(spans) for spans in lanes(path).values()] == [3, 2, 1]
    assert {span.row for span in read_spans(path)} == {"generator-0"}
    assert len(read_spans(path)) == 6


def test_a_resumed_run_uses_the_lanes_that_it_had(path: Path):
    first = Tracer(path)
    first.add("generator-0", "generate", 0.0, 4.0)
    first.add("generator-0", "generate", 1.0, 5.0)
    first.close()
    second = Tracer(path)
    second.add("generator-0", "generate", 10.0, 14.0)
    second.add("policy-0", "learn", 10.0, 14.0)
    second.add("generator-0", "generate", 11.0, 15.0)
    assert [len(spans) for spans in lanes(path).values()] == [2, 2, 1]


def test_a_trace_torn_anywhere_by_a_kill_can_be_continued(path: Path):
    whole = Tracer(path)
    whole.add("policy-0", "learn", 0.0, 1.0)
    whole.close()
    text = path.read_bytes()
    for length in range(len(text)):
        path.write_bytes(text[:length])
        tracer = Tracer(path)
        tracer.add("critic-0", "learn", 1.0, 2.0)
        tracer.close()
        events = json.loads(path.read_text())
        assert events[-1]["ts"] == 1_000_000
        assert read_spans(path)[-1].row == "critic-0"


def test_overlapping_calls_of_an_actor_count_once() -> None:
    busy = BusyTime(since_s=100.0)
    busy.add("generator-0", 102.0, 106.0)
    busy.add("generator-0", 100.0, 103.0)  # reported later, begun before
    busy.add("generator-0", 103.0, 104.0)
    busy.add("policy-0", 108.0, 109.0)
    # 100..106 of 10 s, and 1 s of 10.
    assert busy.shares(110.0) == {"generator-0": 0.6, "policy-0": 0.1}


def test_a_call_counts_only_in_its_interval_and_an_idle_actor_has_a_share_of_zero() -> None:
    busy = BusyTime(since_s=100.0)
    busy.add("policy-0", 100.0, 104.0)
    busy.shares(110.0)
    busy.add("reward-0", 108.0, 112.0)  # 2 s of it in this interval
    assert busy.shares(120.0) == {"policy-0": 0.0, "reward-0": 0.2}
