import json
from pathlib import Path

import pytest

from rlhf_ray.observability.sinks import JsonlSink, Sinks, TensorBoardSink, read_jsonl


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ppo" / "metrics.jsonl"


def test_a_record_is_on_disk_as_soon_as_it_is_logged(path: Path):
    sink = JsonlSink(path)
    sink.log(3, {"objective/kl": 1.5})
    assert path.read_text() == '{"iteration": 3, "objective/kl": 1.5}\n'


def test_numbers_that_json_lacks_become_null(path: Path):
    JsonlSink(path).append({"step": 1, "loss": float("nan"), "samples": [{"score": float("inf")}]})

    def refuse(constant: str) -> None:
        raise AssertionError(f"not JSON: {constant}")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "samples": [{"score": None}]}


def test_truncate_keeps_up_to_the_value_and_drops_a_torn_line(path: Path):
    sink = JsonlSink(path)
    for iteration in (1, 2, 3, 4):
        sink.append({"iteration": iteration, "response": "é\u2028x"})
    with path.open("a") as file:
        file.write('{"iteration": 2, "resp')
    sink.truncate_after("iteration", 2)
    sink.append({"iteration": 3})
    assert [json.loads(line)["iteration"] for line in path.read_text().split("\n")[:-1]] == [
        1,
        2,
        3,
    ]
    assert read_jsonl(path)[0]["response"] == "é\u2028x"
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_truncating_a_missing_file_creates_none(path: Path):
    JsonlSink(path).truncate_after("iteration", 2)
    assert not path.exists()


def test_appending_after_a_torn_line_loses_only_that_line(path: Path):
    path.parent.mkdir()
    path.write_text('{"iteration": 1}\n{"iterat')
    JsonlSink(path).append({"iteration": 2})
    assert read_jsonl(path) == [{"iteration": 1}, {"iteration": 2}]


def test_sinks_refuse_unregistered_names_before_any_sink_logs(path: Path, tmp_path: Path):
    other = tmp_path / "other.jsonl"
    sinks = Sinks([JsonlSink(path), JsonlSink(other, step_key="step")])
    sinks.log(1, {"objective/kl": 0.5})
    with pytest.raises(KeyError, match="objective/undocumented"):
        sinks.log(2, {"objective/undocumented": 1.0})
    sinks.close()
    assert read_jsonl(path) == [{"iteration": 1, "objective/kl": 0.5}]
    assert read_jsonl(other) == [{"step": 1, "objective/kl": 0.5}]


def test_tensorboard_shows_logged_scalars_and_hides_undone_steps(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for step, value in ((1, 0.5), (2, 9.0)):
        sink.log(step, {"objective/kl": value})
    sink.close()
    resumed = TensorBoardSink(tmp_path, purge_step=2)
    resumed.log(2, {"objective/kl": 0.75})
    resumed.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("objective/kl")
    assert [(event.step, event.value) for event in events] == [(1, 0.5), (2, 0.75)]
