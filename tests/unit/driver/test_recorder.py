import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.config.trackers import TrackersConfig
from rlhf_ray.driver import recorder as recorder_module
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.generators.queue import NOTHING_YET
from rlhf_ray.observability.tracing import Tracer, read_spans
from rlhf_ray.types import GeneratorsReport


class Live:
    """A sink that shows numbers as they are now."""

    def __init__(self) -> None:
        self.shown: dict[str, float] = {}
        self.closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.shown.update(metrics)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def live() -> Live:
    return Live()


def make(folder: Path, live: Live) -> Recorder:
    settings = TrackersConfig(tensorboard=False)
    return Recorder(folder / "ppo", Tracer(folder / "trace.json"), settings, None, [live])


def test_who_watches_is_told_of_all_metrics_and_of_what_no_file_keeps(
    tmp_path: Path, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setattr(recorder_module, "unix_now", lambda: now)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=400, free=100))
    recorder = make(tmp_path, live)
    now = 1004.0
    recorder.committed({})
    assert live.shown == {"commit/time": 1004.0}
    recorder.span("policy-0", "learn", 1001.0, 1003.0)
    now = 1008.0
    with recorder.phase("gen", 1):
        now = 1010.0
    recorder.log(1, {"objective/kl": 2.0})
    assert live.shown == {
        "commit/time": 1004.0,
        "objective/kl": 2.0,
        "timing_s/gen": 2.0,
        "disk/free": 100,
        "disk/free_share": 0.25,
        "actors/busy/policy-0": 0.2,  # 2 of 10 s; what the driver waits for is no actor's work
    }
    kept = json.loads((tmp_path / "ppo" / "metrics.jsonl").read_text())
    assert kept == {"iteration": 1, "objective/kl": 2.0, "timing_s/gen": 2.0}
    recorder.close()
    assert live.closed
    assert [span.row for span in read_spans(tmp_path / "trace.json")] == ["policy-0", "driver"]


def test_who_watches_is_told_of_evaluations(tmp_path: Path, live: Live) -> None:
    recorder = make(tmp_path, live)
    recorder.evaluation({"iteration": 3, "eval/score": 0.5, "samples": []})
    assert live.shown == {"eval/score": 0.5}


def test_generators_are_shown_as_they_are_and_not_when_they_have_left(
    tmp_path: Path, live: Live
) -> None:
    recorder = make(tmp_path, live)
    for actor in ("generator-0", "generator-1", "policy-0"):
        recorder.span(actor, "generate", time.time(), time.time())
    report = GeneratorsReport(1, 2, restarts=0, samples_requeued=0, idle=NOTHING_YET)
    recorder.generators(report, ["generator-0", "generator-2"])
    assert (live.shown["generators/ready"], live.shown["generators/target"]) == (1, 2)
    assert math.isnan(live.shown.pop("actors/busy/generator-1"))
    recorder.log(1, {})
    assert {name for name in live.shown if name.startswith("actors/busy/")} == {
        "actors/busy/generator-0",
        "actors/busy/policy-0",
    }


def test_a_save_beside_the_next_iteration_is_a_row_of_its_own(tmp_path: Path, live: Live) -> None:
    recorder = make(tmp_path, live)
    save = recorder.phase("save", 1)
    save.__enter__()
    with recorder.phase("gen", 2):
        save.__exit__(None, None, None)
        recorder.span("policy-0", "logprobs", 1.0, 2.0)
    recorder.close()
    spans = read_spans(tmp_path / "trace.json")
    assert [(span.row, span.name, span.args["iteration"]) for span in spans] == [
        ("disk", "save", 1),
        ("policy-0", "logprobs", 2),
        ("driver", "gen", 2),
    ]


def test_iterations_after_a_change_of_the_config_say_so(tmp_path: Path) -> None:
    settings = TrackersConfig(tensorboard=False)
    for num_changes in (0, 2):
        tracer = Tracer(tmp_path / "trace.json")
        (tmp_path / "changes.jsonl").write_text("{}\n" * num_changes)
        recorder = Recorder(tmp_path / "ppo", tracer, settings, num_changes)
        recorder.log(num_changes + 1, {"objective/kl": 2.0})
        recorder.close()
    assert [record.get("config/changes") for record in recorder.history()] == [None, 2.0]
