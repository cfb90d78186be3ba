"""Tracking libraries behind one protocol; each is imported only if the config turns it on."""

import contextlib
import importlib
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from rlhf_ray.config.trackers import MlflowConfig, TrackersConfig, TrackioConfig, WandbConfig

WANDB_TIMEOUT_S = 60
"""Longest wait for wandb's server at the start and at the end of a run."""

MLFLOW_TIMEOUT_S = 10
"""Longest wait for a response of an MLflow server."""

PARAMS_AT_ONCE = 100
"""MLflow's limit of parameters per call."""


@dataclass(frozen=True)
class RunInfo:
    """The run as a tracker records it."""

    name: str
    """Name of the run."""
    folder: Path
    """Folder of the run, where a library may keep its own files."""
    config: Mapping[str, object]
    """Resolved config with secrets masked."""


class TrackedRun(Protocol):
    """One run in one tracking library. Every method may raise the library's own errors."""

    @property
    def run_id(self) -> str:
        """Id with which `connect` resumes this run."""
        ...

    @property
    def where(self) -> str:
        """The place to see the run: a URL or a command."""
        ...

    @property
    def is_local(self) -> bool:
        """Whether all recorded data stays on this machine."""
        ...

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` at ``step`` of the axis, such as ``sft/step``."""
        ...

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Record a table; all rows have the same columns."""
        ...

    def begin_stage(self, stage: str) -> None:
        """Hear that a stage begins, or goes on."""

    def end_stage(self, stage: str, folder: Path) -> None:
        """Hear that a stage is done, and where its files are."""

    def close(self, failed: bool) -> None:
        """Mark the run as finished or failed, and wait until everything is stored."""
        ...


class WandbRun(TrackedRun):
    """A run in Weights & Biases."""

    def __init__(self, settings: WandbConfig, info: RunInfo, run_id: str | None) -> None:
        wandb = importlib.import_module("wandb")
        self._table = wandb.Table
        self._drawn: set[str] = set()
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            tags=settings.tags,
            mode=settings.mode,
            name=info.name,
            config=dict(info.config),
            dir=str(info.folder),
            id=run_id or secrets.token_hex(4),
            resume="allow",
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=WANDB_TIMEOUT_S,
                finish_timeout=WANDB_TIMEOUT_S,
                finish_timeout_raises=True,
            ),
        )

    @property
    def run_id(self) -> str:
        """wandb's id; the run's page ends in it."""
        return self._run.id

    @property
    def where(self) -> str:
        """URL of its page; offline, the command that uploads it."""
        if self._run.offline:
            return f"offline; wandb sync {self._run.settings.sync_dir}"
        return self._run.url or "disabled"

    @property
    def is_local(self) -> bool:
        """True offline, until `wandb sync` uploads the run."""
        return bool(self._run.offline)

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics against the axis, because wandb's own step only counts calls."""
        for name in metrics.keys() - self._drawn:
            self._run.define_metric(name, step_metric=axis)
            self._drawn.add(name)
        self._run.log({**metrics, axis: step})

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Record a `wandb.Table`."""
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self._run.log({name: self._table(columns=columns, data=data)})

    def close(self, failed: bool) -> None:
        """Upload the rest; what fails to upload stays in run.dir for `wandb sync`."""
        self._run.finish(exit_code=1 if failed else 0)


class TrackioRun(TrackedRun):
    """A run in Trackio, which identifies runs by project and name."""

    def __init__(self, settings: TrackioConfig, info: RunInfo, run_id: str | None) -> None:
        self._trackio = importlib.import_module("trackio")
        self._settings = settings
        self._name = run_id or f"{info.name}-{secrets.token_hex(4)}"
        with _quietly():
            self._run = self._trackio.init(
                project=settings.project,
                name=self._name,
                group=settings.group,
                space_id=settings.space_id,
                config=dict(info.config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    @property
    def run_id(self) -> str:
        """The run's name in its project."""
        return self._name

    @property
    def where(self) -> str:
        """URL of its Space; without one, the command that shows the project."""
        space, project = self._settings.space_id, self._settings.project
        return (
            f"https://huggingface.co/spaces/{space}"
            if space
            else f"trackio show --project {project}"
        )

    @property
    def is_local(self) -> bool:
        """True without a Space."""
        return self._settings.space_id is None

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at their own step: Trackio keeps one for each metric."""
        self._run.log(dict(metrics), step=step)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Record a `trackio.Table`."""
        columns = list(rows[0])
        data = [[row[column] for column in columns] for row in rows]
        self._run.log({name: self._trackio.Table(columns=columns, data=data)}, step=step)

    def close(self, failed: bool) -> None:
        """Store the rest."""
        with _quietly():
            self._trackio.finish()


class MlflowRun(TrackedRun):
    """A run in MLflow, written through a client, so that no global state is touched."""

    def __init__(self, settings: MlflowConfig, info: RunInfo, run_id: str | None) -> None:
        # MLflow's default time-outs and retries would stall training for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(MLFLOW_TIMEOUT_S))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        mlflow = importlib.import_module("mlflow")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = mlflow.MlflowClient(tracking_uri=settings.tracking_uri)
        if run_id is None:
            self._run_id = self._create(settings, info)
        else:
            self._run_id = run_id
            self._client.update_run(run_id, status="RUNNING")

    def _create(self, settings: MlflowConfig, info: RunInfo) -> str:
        existing = self._client.get_experiment_by_name(settings.experiment)
        experiment = (
            existing.experiment_id
            if existing
            else self._client.create_experiment(settings.experiment)
        )
        run_id = self._client.create_run(experiment, run_name=info.name).info.run_id
        params = [self._entities.Param(key, value) for key, value in _flat(info.config)]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(run_id, params=params[first : first + PARAMS_AT_ONCE])
        return run_id

    @property
    def run_id(self) -> str:
        """Id given by the server."""
        return self._run_id

    @property
    def where(self) -> str:
        """Tracking URI and id of the run."""
        return f"{self._client.tracking_uri}, run {self._run_id}"

    @property
    def is_local(self) -> bool:
        """True for a folder or a file; false for a server or a database with a host."""
        return urlsplit(self._client.tracking_uri).scheme in ("", "file", "sqlite")

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics at their own step: MLflow keeps one for each metric."""
        now_ms = int(time.time() * 1000)
        values = [
            self._entities.Metric(_one_level(name), value, now_ms, step)
            for name, value in metrics.items()
        ]
        self._client.log_batch(self._run_id, metrics=values)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Record a separate table for the step, as an artifact."""
        columns = {column: [row[column] for row in rows] for column in rows[0]}
        self._client.log_table(self._run_id, columns, f"{name}/{step:06d}.json")

    def close(self, failed: bool) -> None:
        """Mark the run as finished or failed."""
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


Connect = Callable[[RunInfo, str | None], TrackedRun]
"""Starts a tracker's run, or resumes the one with the given id."""


def configured(trackers: TrackersConfig) -> dict[str, Connect]:
    """Return how to connect to each library that the config turns on, by its package's name."""
    connects: dict[str, Connect] = {}
    if (wandb := trackers.wandb) is not None:
        connects["wandb"] = lambda info, run_id: WandbRun(wandb, info, run_id)
    if (trackio := trackers.trackio) is not None:
        connects["trackio"] = lambda info, run_id: TrackioRun(trackio, info, run_id)
    if (mlflow := trackers.mlflow) is not None:
        connects["mlflow"] = lambda info, run_id: MlflowRun(mlflow, info, run_id)
    return connects


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys and values as text of at most 500 characters, MLflow's limit."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            yield f"{prefix}{key}", text[:500]


def _one_level(name: str) -> str:
    """Turn ``objective/scores/judge`` into ``objective/scores.judge``.

    MLflow's file store makes a folder per level, but ``objective/scores`` is already a file.
    """
    group, slash, rest = name.partition("/")
    return f"{group}{slash}{rest.replace('/', '.')}"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep a library's own output off the terminal."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
