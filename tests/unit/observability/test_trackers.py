"""Records that every tracker gets, once each, over stand-ins for the libraries' modules."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.config import Config, load
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability import trackers
from rlhf_ray.observability.sinks import Sink
from rlhf_ray.observability.trackers import current, numbers, tracking

Calls = list[tuple[Any, ...]]


class FakeWandb(ModuleType):
    """Notes what it is called with; `log` fails as long as `broken` is set."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.calls: Calls = []
        self.broken, self.offline = False, False
        self.Table = lambda columns, data: ("table", columns, data)
        self.Settings = lambda **values: values

    def init(self, **arguments: Any) -> Any:
        self.calls.append(("init", arguments))
        return SimpleNamespace(
            id=arguments["id"],
            url="https://wandb/p/1",
            offline=self.offline,
            settings=SimpleNamespace(sync_dir="there"),
            define_metric=lambda name, step_metric: self.calls.append(("axis", name, step_metric)),
            log=self._log,
            finish=lambda exit_code: self.calls.append(("finish", exit_code)),
        )

    def _log(self, values: Any) -> None:
        if self.broken:
            raise ConnectionError("network is down")
        self.calls.append(("log", values))

    def of(self, kind: str) -> Calls:
        """Arguments of the calls of one kind."""
        return [call[1:] for call in self.calls if call[0] == kind]


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def config() -> Config:
    return load(
        None, ["trackers.wandb={project: p, tags: [a]}", "trackers.samples=all", "run.name=mine"]
    )


def log(sinks: list[Sink], *steps: int) -> None:
    for step in steps:
        for sink in sinks:
            sink.log(step, {"loss": step / 10})


def test_each_stage_has_its_own_metric_names_and_axis(
    wandb: FakeWandb, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tracking(config, tmp_path):
        assert capsys.readouterr().out == "wandb: https://wandb/p/1\n"
        log(current().sinks("sft", "step", []), 5, 10)
        (sink,) = current().sinks("ppo", "iteration", [])
        sink.log(1, {"objective/kl": 0.5})
        current().table("completions", 1, [{"iteration": 1, "response": "x"}])
    assert wandb.of("log") == [
        ({"sft/loss": 0.5, "sft/step": 5},),
        ({"sft/loss": 1.0, "sft/step": 10},),
        ({"objective/kl": 0.5, "iteration": 1},),
        ({"completions": ("table", ["iteration", "response"], [[1, "x"]])},),
    ]
    assert wandb.of("axis") == [("sft/loss", "sft/step"), ("objective/kl", "iteration")]
    assert wandb.of("finish") == [(0,)]


def test_a_resumed_run_keeps_its_id_and_records_no_step_twice(
    wandb: FakeWandb, config: Config, tmp_path: Path
) -> None:
    with tracking(config, tmp_path):
        log(current().sinks("sft", "step", []), 1, 2, 3)
        current().table("completions", 2, [{"iteration": 2}])
    with tracking(config, tmp_path):  # killed at 3, saved at 1: 2 and 3 are done again
        log(current().sinks("sft", "step", [{"step": 1, "loss": 0.1}]), 2, 3, 4)
        current().table("completions", 2, [{"iteration": 2}])
    first, second = (arguments["id"] for (arguments,) in wandb.of("init"))
    assert first == second
    assert wandb.of("init")[1][0]["resume"] == "allow"
    metrics = [values for (values,) in wandb.of("log") if "sft/step" in values]
    assert [values["sft/step"] for values in metrics] == [1, 2, 3, 4]
    assert len(wandb.of("log")) == 5


def test_a_new_folder_is_a_new_run(wandb: FakeWandb, config: Config, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with tracking(config, tmp_path / name):
            pass
    first, second = (arguments["id"] for (arguments,) in wandb.of("init"))
    assert first != second


def test_a_tracker_turned_on_late_receives_the_earlier_steps(
    wandb: FakeWandb, config: Config, tmp_path: Path
) -> None:
    records = [{"iteration": 1, "loss": 0.1}, {"iteration": 2, "loss": None, "samples": [1]}]
    with tracking(config, tmp_path):
        current().sinks("ppo", "iteration", records)
    assert wandb.of("log") == [({"loss": 0.1, "iteration": 1},), ({"iteration": 2},)]


def test_a_tracker_turned_on_late_receives_finished_stages(
    wandb: FakeWandb, config: Config, tmp_path: Path
) -> None:
    for stage, finished in (("sft", True), ("reward", False)):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "metrics.jsonl").write_text('{"step": 5, "loss": 0.5}\n')
        if finished:
            (tmp_path / stage / "summary.json").write_text("{}")
    with tracking(config, tmp_path):
        pass
    assert wandb.of("log") == [({"sft/loss": 0.5, "sft/step": 5},)]


def test_evaluations_of_a_finished_ppo_are_recorded_once(
    wandb: FakeWandb, config: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "ppo"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"iteration": 1, "objective/kl": 0.5}\n')
    (folder / "eval.jsonl").write_text('{"iteration": 0, "eval/score": 2.0, "samples": []}\n')
    (folder / "summary.json").write_text("{}")
    for _ in range(2):
        with tracking(config, tmp_path):
            pass
    assert wandb.of("log") == [
        ({"objective/kl": 0.5, "iteration": 1},),
        ({"eval/score": 2.0, "iteration": 0},),
    ]
    told = json.loads((tmp_path / "trackers.json").read_text())["wandb"]["told"]
    assert told == {"ppo": 1, "ppo/eval": 0}


def test_the_parts_of_a_stage_count_steps_separately(
    wandb: FakeWandb, config: Config, tmp_path: Path
) -> None:
    with tracking(config, tmp_path):
        log(current().sinks("ppo", "iteration", []), 1)
        log(current().sinks("ppo", "iteration", [], part="/eval"), 0, 1)
    assert [values["iteration"] for (values,) in wandb.of("log")] == [1, 0, 1]
    told = json.loads((tmp_path / "trackers.json").read_text())["wandb"]["told"]
    assert told == {"ppo": 1, "ppo/eval": 1}


def test_a_repeated_stage_is_recorded_again(
    wandb: FakeWandb, config: Config, tmp_path: Path
) -> None:
    with tracking(config, tmp_path):
        log(current().sinks("sft", "step", []), 1, 2)
    with tracking(config, tmp_path):
        current().forget("sft")
        log(current().sinks("sft", "step", []), 1, 2)
    assert [values["sft/step"] for (values,) in wandb.of("log")] == [1, 2, 1, 2]


def test_a_failing_tracker_warns_once_and_catches_up_in_the_next_process(
    wandb: FakeWandb, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"step": step, "loss": step / 10} for step in (1, 2, 3)]
    with tracking(config, tmp_path):
        sinks = current().sinks("sft", "step", [])
        log(sinks, 1)
        wandb.broken = True
        log(sinks, 2, 3)
    warning = capsys.readouterr().out
    assert warning.count("Warning: wandb failed (ConnectionError: network is down)") == 1
    assert wandb.of("finish") == []
    wandb.broken = False
    with tracking(config, tmp_path):
        current().sinks("sft", "step", records)
    assert [values["sft/step"] for (values,) in wandb.of("log")] == [1, 2, 3]


def test_a_tracker_that_cannot_start_does_not_fail_the_run(
    wandb: FakeWandb,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no login")

    monkeypatch.setattr(wandb, "init", refuse)
    with tracking(config, tmp_path):
        log(current().sinks("sft", "step", []), 1)
    assert "Warning: wandb failed (RuntimeError: no login)" in capsys.readouterr().out
    assert not (tmp_path / "trackers.json").exists()


@pytest.mark.parametrize(
    ("samples", "offline", "is_told"),
    [
        ("local", False, False),
        ("local", True, True),
        ("all", False, True),
        ("none", True, False),
    ],
)
def test_samples_leave_the_machine_only_if_the_config_allows_it(
    wandb: FakeWandb, tmp_path: Path, samples: str, offline: bool, is_told: bool
) -> None:
    wandb.offline = offline
    with tracking(load(None, ["trackers.wandb={}", f"trackers.samples={samples}"]), tmp_path):
        current().table("completions", 1, [{"iteration": 1, "response": "x"}])
    assert ("completions" in str(wandb.of("log"))) == is_told


def test_a_run_that_fails_is_marked_as_failed(
    wandb: FakeWandb, config: Config, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt), tracking(config, tmp_path):
        raise KeyboardInterrupt
    assert wandb.of("finish") == [(1,)]


def test_trackers_receive_the_config_without_secrets(wandb: FakeWandb, tmp_path: Path) -> None:
    config = load(
        None,
        ["trackers.wandb={}", "cluster.env={A: b}"],
    )
    with tracking(config, tmp_path):
        pass
    ((arguments,),) = wandb.of("init")
    assert arguments["config"]["cluster"]["env"] == {"A": "..."}
    assert arguments["config"]["ppo"]["gamma"] == 1.0
    assert arguments["config"]["rollout"]["max_tokens"] == 64


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    config = load(None, [f"trackers.{name}={{}}"])
    message = rf"trackers\.{name} is set.*not installed; run pip install {name}"
    with pytest.raises(ConfigError, match=message), tracking(config, tmp_path):
        pass


def test_without_trackers_no_file_is_written(tmp_path: Path) -> None:
    with tracking(Config(), tmp_path):
        assert current().sinks("sft", "step", [{"step": 1, "loss": 0.5}]) == []
    assert list(tmp_path.iterdir()) == []


def test_numbers_are_the_registered_metrics_of_a_json_line() -> None:
    record = {"step": 3, "loss": None, "grad_norm": 0.5, "samples": [], "note": "x"}
    assert numbers(record) == {"grad_norm": 0.5}
    assert numbers({"objective/scores/judge": 2.0}) == {"objective/scores/judge": 2.0}
