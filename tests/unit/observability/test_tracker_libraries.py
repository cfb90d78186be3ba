"""The libraries themselves, where they are installed: offline, in a folder of the test."""

import json
import sqlite3
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config import load
from rlhf_ray.observability.trackers import current, tracking


def follow(folder: Path, tracker: str, settings: str, *further: str) -> str:
    """Follow a run that is killed after step 3, saved at 1, and goes on; the id of its run."""
    config = load(None, ["run.name=mine", f"trackers.{tracker}={settings}", *further])
    for records, steps in (([], (1, 2, 3)), ([{"step": 1, "loss": 0.1}], (2, 3, 4))):
        with tracking(config, folder):
            (sink,) = current().sinks("sft", "step", records)
            for step in steps:
                sink.log(step, {"loss": step / 10})
            (ppo,) = current().sinks("ppo", "iteration", [])
            ppo.log(1, {"objective/scores": 0.5, "objective/scores/judge": 0.25})
            current().table("completions", 4, [{"iteration": 4, "response": "x"}])
    noted = json.loads((folder / "trackers.json").read_text())[tracker]
    assert noted["told"] == {"sft": 4, "ppo": 1, "completions": 4}
    return noted["run_id"]


CURVE = [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run_id = follow(tmp_path, "wandb", "{mode: offline, tags: [a]}")
    folders = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    (table,) = (tmp_path / "wandb").glob("offline-run-*/files/media/table/completions*.json")
    assert json.loads(table.read_text()) == {
        "columns": ["iteration", "response"],
        "data": [[4, "x"]],
    }
    assert sorted(point for folder in folders for point in wandb_history(folder)) == CURVE


def wandb_history(folder: Path) -> list[tuple[int, float]]:
    """Step and loss of every record in an offline run's file."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    points = []
    for data in log_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        values = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        if "sft/loss" in values:
            points.append((values["sft/step"], values["sft/loss"]))
    return points


def log_records(content: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: blocks of 32 KiB, fragments of checksum, length, kind."""
    place, record = 7, b""  # the file begins with seven bytes of its own
    while place + 7 <= len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, last
            yield record
            record = b""


def test_trackio_in_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    run_id = follow(tmp_path, "trackio", "{project: p}")
    assert run_id.startswith("mine-")
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert {name for name, _, _ in rows} == {run_id}
    metrics = [(step, json.loads(values)) for _, step, values in rows]
    assert [(step, v["sft/loss"]) for step, v in metrics if "sft/loss" in v] == CURVE
    assert [step for step, values in metrics if "completions" in values] == [4]


def test_mlflow_in_a_local_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "store").as_uri()
    run_id = follow(tmp_path, "mlflow", f"{{tracking_uri: '{uri}', experiment: e}}")
    client = mlflow.MlflowClient(tracking_uri=uri)
    history = client.get_metric_history(run_id, "sft/loss")
    assert [(point.step, point.value) for point in history] == CURVE
    (score,) = client.get_metric_history(run_id, "objective/scores.judge")
    assert score.value == 0.25
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "mine"
    assert run.data.params["ppo.gamma"] == "1.0"
    assert [item.path for item in client.list_artifacts(run_id, "completions")] == [
        "completions/000004.json"
    ]


class FakeMlflow(ModuleType):
    """The client's calls, noted."""

    tracking_uri = "sqlite:///m.db"

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.__spec__ = ModuleSpec("mlflow", None)
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def MlflowClient(self, tracking_uri: str | None) -> Any:  # noqa: N802  (the library's name)
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="7")

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.calls.append(("create", (experiment, run_name)))
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def update_run(self, run_id: str, status: str) -> None:
        self.calls.append(("update", (run_id, status)))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        self.calls.append(("params" if params else "metrics", (run_id, *metrics, *params)))

    def log_table(self, run_id: str, data: Any, artifact_file: str) -> None:
        self.calls.append(("table", (run_id, data, artifact_file)))

    def set_terminated(self, run_id: str, status: str) -> None:
        self.calls.append(("end", (run_id, status)))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [arguments for name, arguments in self.calls if name == kind]


def test_the_mlflow_run_calls_its_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeMlflow()
    entities = ModuleType("mlflow.entities")
    entities.Param = lambda key, value: (key, value)  # type: ignore[attr-defined]
    entities.Metric = lambda key, value, _, step: (key, value, step)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    assert follow(tmp_path, "mlflow", "{}") == "r1"
    assert fake.of("create") == [("7", "mine")]
    assert fake.of("update") == [("r1", "RUNNING")]
    assert "mlflow: sqlite:///m.db, run r1\n" in capsys.readouterr().out
    params = dict(param for _, *params in fake.of("params") for param in params)
    assert params["ppo.gamma"] == "1.0"
    assert params["run.name"] == "mine"
    losses = [metric for _, *metrics in fake.of("metrics") for metric in metrics]
    assert [m for m in losses if m[0] == "sft/loss"] == [
        ("sft/loss", n / 10, n) for n in range(1, 5)
    ]
    table = {"iteration": [4], "response": ["x"]}
    assert fake.of("table") == [("r1", table, "completions/000004.json")]
    assert fake.of("end") == [("r1", "FINISHED")] * 2


def test_the_trackio_run_calls_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, calls = ModuleType("trackio"), []
    fake.__spec__ = ModuleSpec("trackio", None)

    def init(**arguments: Any) -> Any:
        calls.append(("init", arguments))
        return SimpleNamespace(log=lambda values, step: calls.append(("log", (step, values))))

    vars(fake).update(
        init=init, finish=lambda: print("noise"), Table=lambda columns, data: (columns, data)
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    run_id = follow(tmp_path, "trackio", "{space_id: a/b}", "trackers.samples=all")
    opened = [arguments for kind, arguments in calls if kind == "init"]
    assert [arguments["name"] for arguments in opened] == [run_id, run_id]
    assert {(a["resume"], a["space_id"], a["project"]) for a in opened} == {
        ("allow", "a/b", "rlhf-ray")
    }
    logged = [arguments for kind, arguments in calls if kind == "log"]
    assert logged == [
        (1, {"sft/loss": 0.1}),
        (2, {"sft/loss": 0.2}),
        (3, {"sft/loss": 0.3}),
        (1, {"objective/scores": 0.5, "objective/scores/judge": 0.25}),
        (4, {"completions": (["iteration", "response"], [[4, "x"]])}),
        (4, {"sft/loss": 0.4}),
    ]
