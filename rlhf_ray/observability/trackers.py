"""Trackers record a whole pipeline run: the metrics of every stage, in one run per tracker.

Callbacks of the user's hear the same, and of stages.

``trackers.json`` in the run's folder holds the id of each tracker's run, so that a resumed run
continues there, and the last step of each stream, so that no step is recorded twice.
"""

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic cannot read typing's before Python 3.12

from rlhf_ray.config import Config
from rlhf_ray.config.section import masked
from rlhf_ray.config.trackers import Samples
from rlhf_ray.disk import write_atomically
from rlhf_ray.errors import ConfigError, RlhfError
from rlhf_ray.observability.metrics import is_registered
from rlhf_ray.observability.progress import Progress
from rlhf_ray.observability.sinks import Sink, read_jsonl
from rlhf_ray.observability.tracker_libraries import Connect, RunInfo, TrackedRun, configured
from rlhf_ray.plugins import load_function

EVENTS = (
    "on_run_begin",
    "on_stage_begin",
    "on_metrics",
    "on_samples",
    "on_stage_end",
    "on_run_end",
)
"""Methods that a callback may have, in the order in which they are first called."""

# A context variable, so that stages need not pass the trackers through every call.
_current: ContextVar["Trackers | None"] = ContextVar("trackers", default=None)


class Tracker:
    """One tracker. After a failure it is not used again by this process."""

    def __init__(
        self, name: str, connect: Connect, info: RunInfo, memory: "Memory", samples: Samples
    ) -> None:
        self._name, self._memory, self._samples = name, memory, samples
        self._run: TrackedRun | None = None
        try:
            self._run = connect(info, memory.run_id(name))
            memory.set_run_id(name, self._run.run_id)
            Progress().say(f"{name}: {self._run.where}")
        except Exception as error:
            self._give_up(error)

    def log(self, stream: str, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a stream's step, unless they were recorded before."""
        self._record(stream, step, lambda run: run.log(axis, step, metrics))

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Record a table of samples, unless it was recorded before or the config forbids it.

        The table's name is its stream.
        """
        local = self._run is not None and self._run.is_local
        if self._samples == "all" or (self._samples == "local" and local):
            self._record(name, step, lambda run: run.table(name, step, rows))

    def hear(self, tell: Callable[[TrackedRun], None]) -> None:
        """Tell an event that is recorded nowhere."""
        if self._run is not None:
            try:
                tell(self._run)
            except Exception as error:
                self._give_up(error)

    def forget(self, stream: str) -> None:
        """Record a stream again from its first step."""
        if self._run is not None:
            self._memory.set_last_step(self._name, stream, -1)

    def close(self, failed: bool) -> None:
        """Close the tracker's run."""
        self.hear(lambda run: run.close(failed))

    def _record(self, stream: str, step: int, record: Callable[[TrackedRun], None]) -> None:
        if self._run is None or step <= self._memory.last_step(self._name, stream):
            return
        try:
            record(self._run)
        except Exception as error:
            self._give_up(error)
        else:
            self._memory.set_last_step(self._name, stream, step)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        # A Progress created now prints above the live bar.
        Progress().say(
            f"Warning: {self._name} failed ({type(error).__name__}: {error}). The run continues "
            "without it. The next run in this folder sends it the missing metrics, but not the "
            "tables of completions; those are in completions.jsonl"
        )


class CallbackRun:
    """A run as one callback hears of it; what the callback lacks is not called."""

    run_id, where, is_local = "", "called in the driver", True

    def __init__(self, make: Callable[[], object], info: RunInfo) -> None:
        self._callback = make()
        if not any(hasattr(self._callback, event) for event in EVENTS):
            raise RlhfError(f"it has none of the methods {', '.join(EVENTS)}")
        self._tell("on_run_begin", info.folder, info.config)

    def log(self, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        """Tell metrics by their names in metrics.jsonl; ``axis`` is ``sft/step`` or PPO's."""
        stage, slash, _ = axis.rpartition("/")
        named = {name.removeprefix(f"{stage}{slash}"): value for name, value in metrics.items()}
        self._tell("on_metrics", stage or "ppo", step, named)

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Tell samples; ``name`` is ``completions``."""
        self._tell("on_samples", step, rows)

    def begin_stage(self, stage: str) -> None:
        """Tell that a stage begins, or goes on."""
        self._tell("on_stage_begin", stage)

    def end_stage(self, stage: str, folder: Path) -> None:
        """Tell that a stage is done, and where its files are."""
        self._tell("on_stage_end", stage, folder)

    def close(self, failed: bool) -> None:
        """Tell that the run ends."""
        self._tell("on_run_end", failed)

    def _tell(self, event: str, *told: object) -> None:
        try:
            getattr(self._callback, event, _nothing)(*told)
        except SystemExit as error:
            raise RlhfError(f"{event} raised SystemExit: {error.code}") from None


def _nothing(*_: object) -> None:
    """Stand for a method that a callback lacks."""


def _callbacks(specs: Sequence[str]) -> dict[str, Connect]:
    """Return what makes each callback of ``run.callbacks``, by its name in the config.

    Raises:
        ConfigError: one cannot be loaded.
    """
    makes = {spec: load_function(spec, "run.callbacks") for spec in specs}

    def connect(make: Callable[..., object]) -> Connect:
        return lambda info, _: CallbackRun(make, info)

    return {spec: connect(make) for spec, make in makes.items()}


class _Recorded(TypedDict):
    """The state of one tracker: the id of its run, and the last recorded step of each stream."""

    run_id: NotRequired[str]
    told: dict[str, int]


_RECORDED = TypeAdapter(dict[str, _Recorded])


class Memory:
    """Contents of ``trackers.json``: ``{tracker: {run_id, told: {stream: step}}}``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._values = _RECORDED.validate_json(path.read_bytes())
        except (OSError, ValidationError):
            self._values = {}

    def run_id(self, tracker: str) -> str | None:
        """Return the id of the tracker's run; None before it has one."""
        return self._values[tracker].get("run_id") if tracker in self._values else None

    def set_run_id(self, tracker: str, run_id: str) -> None:
        """Store the id of a tracker's run."""
        self._values.setdefault(tracker, {"told": {}})["run_id"] = run_id
        self._write()

    def last_step(self, tracker: str, stream: str) -> int:
        """Return the last recorded step of a stream; -1 before the first."""
        return self._values[tracker]["told"].get(stream, -1)

    def set_last_step(self, tracker: str, stream: str, step: int) -> None:
        """Store the last recorded step of a stream."""
        self._values[tracker]["told"][stream] = step
        self._write()

    def _write(self) -> None:
        with suppress(ConfigError):  # the disk is full: the next one holds all of this
            write_atomically(self._path, json.dumps(self._values, indent=2) + "\n")


class TrackerSink:
    """A tracker as the sink of a stage; adds ``prefix`` to names and logs against ``axis``."""

    def __init__(self, tracker: Tracker, stream: str, prefix: str, axis: str) -> None:
        self._tracker, self._stream, self._prefix, self._axis = tracker, stream, prefix, axis

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        named = {f"{self._prefix}{name}": value for name, value in metrics.items()}
        self._tracker.log(self._stream, self._axis, step, named)

    def close(self) -> None:
        """Do nothing: the tracker stays open for the next stage."""


class Trackers:
    """All trackers of a run."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def sinks(
        self, stage: str, step_key: str, records: Sequence[Mapping[str, Any]], part: str = ""
    ) -> list[Sink]:
        """Return a sink per tracker, after recording the steps that the tracker has missed.

        Args:
            stage: name of the stage; prefix of its metrics, except for PPO's.
            step_key: unit of the steps, and the key of the step in ``records``.
            records: the stage's JSON lines so far.
            part: suffix of the stream, for a stage that logs a step in several parts.
        """
        prefix = "" if stage == "ppo" else f"{stage}/"
        sinks: list[Sink] = [
            TrackerSink(tracker, f"{stage}{part}", prefix, f"{prefix}{step_key}")
            for tracker in self._trackers
        ]
        for record in records if sinks else ():
            for sink in sinks:
                sink.log(record[step_key], numbers(record))
        return sinks

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Record a table in every tracker."""
        for tracker in self._trackers:
            tracker.table(name, step, rows)

    def begin_stage(self, stage: str) -> None:
        """Tell every tracker that a stage begins."""
        for tracker in self._trackers:
            tracker.hear(lambda run: run.begin_stage(stage))

    def end_stage(self, stage: str, folder: Path) -> None:
        """Tell every tracker that a stage is done, and where its files are."""
        for tracker in self._trackers:
            tracker.hear(lambda run: run.end_stage(stage, folder))

    def forget(self, stage: str) -> None:
        """Record the steps of a repeated stage again."""
        for tracker in self._trackers:
            for stream in (stage, f"{stage}/eval"):
                tracker.forget(stream)

    def close(self, failed: bool) -> None:
        """Close every tracker's run."""
        for tracker in self._trackers:
            tracker.close(failed)


@contextmanager
def tracking(config: Config, folder: Path) -> Iterator[None]:
    """Record the body of the ``with`` in the trackers that the config turns on, and callbacks.

    Raises:
        ConfigError: the package of a tracker is not installed, or a callback cannot be loaded.
    """
    connects = configured(config.trackers)
    missing = [name for name in connects if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"trackers.{missing[0]} is set, but the package {missing[0]} is not installed; run "
            f"pip install {' '.join(missing)}, or remove the key"
        )
    connects |= _callbacks(config.run.callbacks)
    info = RunInfo(config.run.name, folder, masked(config.model_dump(mode="json")))
    memory = Memory(folder / "trackers.json")
    samples = config.trackers.samples
    trackers = Trackers(
        [Tracker(name, connect, info, memory, samples) for name, connect in connects.items()]
    )
    token = _current.set(trackers)
    failed = True
    try:
        if connects:
            _catch_up_with_finished_stages(trackers, folder)
        yield
        failed = False
    finally:
        _current.reset(token)
        trackers.close(failed)


def _catch_up_with_finished_stages(trackers: Trackers, folder: Path) -> None:
    for summary in sorted(folder.glob("*/summary.json")):
        stage = summary.parent.name
        step_key = "iteration" if stage == "ppo" else "step"
        trackers.sinks(stage, step_key, read_jsonl(summary.with_name("metrics.jsonl")))
        # PPO's `Recorder` and the supervised stages log evaluations under this part.
        evaluations = read_jsonl(summary.with_name("eval.jsonl"))
        trackers.sinks(stage, step_key, evaluations, part="/eval")


def current() -> Trackers:
    """Return the trackers of this run; outside `tracking` there are none."""
    return _current.get() or Trackers(())


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the registered metrics of a JSON line, without null, which stands for non-finite."""
    return {
        name: value for name, value in record.items() if is_registered(name) and value is not None
    }
