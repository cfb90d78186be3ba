import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import Config, resolve
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.trackers import current, tracking

NOTES = """
import json
import pathlib


class Notes:
    def note(self, *values):
        with pathlib.Path({path!r}).open("a") as file:
            print(json.dumps(values), file=file)

    def on_run_begin(self, folder, config):
        self.note("begin", folder.name, config["run"]["name"])

    def on_stage_begin(self, stage):
        self.note("stage", stage)

    def on_metrics(self, stage, step, metrics):
        self.note("metrics", stage, step, metrics)

    def on_samples(self, step, rows):
        self.note("samples", step, len(rows))

    def on_stage_end(self, stage, folder):
        self.note("done", stage, folder.name)

    def on_run_end(self, failed):
        self.note("end", failed)


class Half:
    def on_metrics(self, stage, step, metrics):
        raise {error}


class Nothing:
    pass


class Broken:
    def __init__(self):
        raise KeyError("token")
"""


def config_of(folder: Path, *names: str, error: str = "ValueError('no such table')") -> Config:
    file = folder / "notes.py"
    file.write_text(NOTES.format(path=str(folder / "notes.jsonl"), error=error))
    return resolve(
        {"run": {"dir": str(folder / "run"), "callbacks": [f"{file}:{name}" for name in names]}}
    )


def run(config: Config, first: int = 1, *, fails: bool = False) -> None:
    folder = Path(config.run.dir)
    folder.mkdir(exist_ok=True)
    with tracking(config, folder):
        current().begin_stage("ppo")
        (sink,) = current().sinks("ppo", "iteration", [])
        (other,) = current().sinks("sft", "step", [])
        for iteration in range(first, first + 2):
            sink.log(iteration, {"objective/kl": 0.5})
            current().table("completions", iteration, [{"prompt": "a"}])
        other.log(3, {"loss": 2.0})
        if fails:
            raise RuntimeError("died")
        current().end_stage("ppo", folder / "ppo")


def noted(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]


def test_a_callback_hears_each_event_once_over_all_starts_of_a_run(tmp_path: Path) -> None:
    config = config_of(tmp_path, "Notes")
    with pytest.raises(RuntimeError):
        run(config, fails=True)
    run(config, first=2)
    assert noted(tmp_path) == [
        ["begin", "run", "run"],
        ["stage", "ppo"],
        ["metrics", "ppo", 1, {"objective/kl": 0.5}],
        ["samples", 1, 1],
        ["metrics", "ppo", 2, {"objective/kl": 0.5}],
        ["samples", 2, 1],
        ["metrics", "sft", 3, {"loss": 2.0}],
        ["end", True],
        ["begin", "run", "run"],
        ["stage", "ppo"],
        ["metrics", "ppo", 3, {"objective/kl": 0.5}],
        ["samples", 3, 1],
        ["done", "ppo", "ppo"],
        ["end", False],
    ]


@pytest.mark.parametrize(
    ("name", "error", "warning"),
    [
        ("Half", "ValueError('no such table')", "Half failed (ValueError: no such table)"),
        ("Half", "SystemExit(3)", "Half failed (RlhfError: on_metrics raised SystemExit: 3)"),
        ("Broken", "", "Broken failed (KeyError: 'token')"),
        ("Nothing", "", "Nothing failed (RlhfError: it has none of the methods on_run_begin, "),
    ],
)
def test_a_callback_that_fails_is_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, error: str, warning: str
) -> None:
    run(config_of(tmp_path, name, error=error or "ValueError"))
    printed = capsys.readouterr().out
    assert warning in printed
    assert printed.count("failed") == 1


def test_callbacks_that_cannot_be_loaded_are_refused_at_the_start(tmp_path: Path) -> None:
    config = config_of(tmp_path, "Missing")
    with pytest.raises(ConfigError, match=r"run\.callbacks: .*notes\.py:Missing: .*no function"):
        run(config)
    for given, message in (
        (["notes"], "must have the form module:Class"),
        (["a:B", "a:B"], "names a:B more than once"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve({"run": {"callbacks": given}})
