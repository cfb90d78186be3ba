"""The report's section on restarts, lost time and the ledger."""

import json
from pathlib import Path

import pytest

from rlhf_ray.report.data import read
from rlhf_ray.report.reliability import reliability
from rlhf_ray.report.report import build

START = {"time": 1_700_000_000.0, "role": "driver", "cause": "start", "restarts": 0, "lost_s": 0.0}
DIED = {
    "time": 1_700_000_060.0,
    "role": "policy",
    "cause": "died",
    "restarts": 1,
    "seconds": 12.5,
    "lost_s": 12.5,
}
DOWN = {"time": 1_700_000_090.0, "role": "driver", "cause": "down", "restarts": 1, "lost_s": 7.5}
SUMMARY = {
    "ledger": {"drawn": 64, "learnt": 56, "discarded": 8, "filtered": 0, "in_flight": 0},
    "effective_time_ratio": 0.8,
    "seconds_useful": 80.0,
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "ppo"
    folder.mkdir()
    lines = [json.dumps(record) + "\n" for record in (START, DIED, DOWN)]
    (folder / "outages.jsonl").write_text("".join(lines))
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "objective/scores": 0.5}\n')
    return tmp_path


def test_a_finished_run_shows_ledger_ratio_restarts_and_each_outage(run_dir: Path) -> None:
    (run_dir / "ppo" / "summary.json").write_text(json.dumps(SUMMARY))
    found = reliability(read(run_dir))
    assert found is not None
    assert found.ratio == 0.8
    counts = [("drawn", 64), ("learnt", 56), ("discarded", 8), ("filtered", 0), ("in flight", 0)]
    assert found.ledger == counts
    assert found.restarts == [("driver", 1), ("policy", 1)]
    assert [(event["what"], event["out_s"], event["lost_s"]) for event in found.events] == [
        ("policy: died", 12.5, 12.5),
        ("driver: down", 7.5, 7.5),
    ]
    html = build(run_dir).read_text()
    assert "80.0%" in html
    assert "policy: died" in html
    assert "Useful and lost time" in html


def test_a_run_that_is_not_finished_shows_what_happened_so_far(run_dir: Path) -> None:
    found = reliability(read(run_dir))
    assert found is not None
    assert (found.ratio, found.num_events) == (None, 2)
    assert found.chart is not None


def test_a_run_of_an_older_version_has_no_such_section(run_dir: Path) -> None:
    (run_dir / "ppo" / "outages.jsonl").unlink()
    assert reliability(read(run_dir)) is None
    assert "Reliability" not in build(run_dir).read_text()


def test_records_that_hold_something_else_are_shown_as_far_as_they_go(run_dir: Path) -> None:
    with (run_dir / "ppo" / "outages.jsonl").open("a") as file:
        file.write('{"role": 3, "lost_s": "much", "restarts": null}\n')
    found = reliability(read(run_dir))
    assert found is not None
    assert found.events[-1]["what"] == "3: –"
    assert found.events[-1]["time"] == "–"
