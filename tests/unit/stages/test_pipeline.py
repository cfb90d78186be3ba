"""The beginning of a run: its folder, and its messages as it enters Ray."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from rlhf_ray.cluster.process_identity import identity
from rlhf_ray.cluster.session import CARRIED
from rlhf_ray.config import Config, resolve
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.runs.control import ControlFiles
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages import pipeline
from rlhf_ray.stages.ppo import stage as ppo_stage
from rlhf_ray.stages.supervised import ray_train


@pytest.mark.parametrize("unguarded", [[], ["10.0.0.2", "10.0.0.3"]])
def test_a_joined_cluster_without_a_token_causes_a_warning(
    unguarded: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    @contextmanager
    def session(_: Config) -> Iterator[None]:
        yield

    monkeypatch.setattr(pipeline, "ray_session", session)
    monkeypatch.setattr(pipeline, "require_same_files", lambda *_: unguarded)
    monkeypatch.setattr(pipeline, "require_capacity", lambda *_: None)
    monkeypatch.setattr(pipeline, "run_stage", lambda *_: None)
    config = {"run": {"dir": str(tmp_path / "run")}, "cluster": {"mode": "ray"}}
    pipeline.run_single(resolve(config), "ppo")
    said = " ".join(capsys.readouterr().out.split())
    assert ("no token on 10.0.0.2, 10.0.0.3: anyone who reaches" in said) == bool(unguarded)
    assert ("Warning: " in said) == bool(unguarded)


@pytest.mark.parametrize("before", [None, "3"])
@pytest.mark.parametrize("fails", [False, True])
def test_a_run_without_gpus_leaves_them_to_the_next_one_of_its_process(
    before: str | None, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before or "")
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    seen: list[str | None] = []

    def run_stage(*_: object) -> None:
        seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        if fails:
            raise DataError("no rows")

    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    run = {"dir": str(tmp_path / "run"), "stages": ["report"]}
    for start in (pipeline.run, lambda config: pipeline.run_single(config, "report")):
        for gpus, visible in ((0, ""), (None, before)):
            config = resolve({"run": run, "placement": {"gpus": gpus}})
            with suppress(DataError):
                start(config)
            assert seen.pop() == visible
            assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_the_folder_of_a_run_in_progress_is_left_unchanged(resume: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}\n")
    ControlFiles(run).open("mine")
    status = run / "status.json"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        written = json.loads(status.read_text())
        written["driver"] |= identity(psutil.Process(other.pid))
        status.write_text(json.dumps(written))
        config = resolve({"run": {"dir": str(run), "resume": resume}})
        with pytest.raises(ConfigError, match=f"in use by process {other.pid}"):
            pipeline.open_run(RunFolder(config))
        other.kill()
    assert list(tmp_path.iterdir()) == [run]
    assert (run / "config.yaml").read_text() == "{}\n"


def test_processes_begin_before_their_stage_has_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    @contextmanager
    def session(_: Config) -> Iterator[None]:
        events.append("Ray")
        yield

    def run_stage(config: Config, stage: str) -> None:
        events.append(stage)
        RunFolder(config).write_summary(stage, {"iterations": config.ppo.iterations})

    monkeypatch.setattr(pipeline, "ray_session", session)
    monkeypatch.setattr(pipeline, "dashboard_url", lambda: None)
    monkeypatch.setattr(pipeline, "run_stage", run_stage)
    monkeypatch.setattr(ray_train, "begin_ahead", lambda _, stage: events.append(f"begin {stage}"))
    monkeypatch.setattr(ppo_stage, "begin_ahead", lambda _: events.append("begin ppo"))
    monkeypatch.setattr(CARRIED, "close", lambda: events.append("close"))
    stages = ["prepare", "pretrain", "sft", "reward", "ppo", "report"]
    pipeline.run(
        resolve(
            {
                "run": {"dir": str(tmp_path / "run"), "stages": stages},
                "cluster": {"mode": "local"},
            }
        )
    )
    assert events == [
        *("Ray", "begin pretrain", "prepare"),
        *("begin pretrain", "pretrain", "begin sft", "sft"),
        *("begin reward", "begin ppo", "reward"),
        *("close", "ppo", "close", "report"),
    ]
