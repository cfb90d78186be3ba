"""Trackers follow a whole pipeline run: every stage's metrics, under one run of theirs each.

What a tracker was told is noted in ``trackers.json`` in the run's folder: its run's id, so that a
run which goes on continues there, and the last step of each stream, so that none is told twice.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.config.credentials import masked
from rlhf_ray.config.trackers import Samples
from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.metrics import is_registered
from rlhf_ray.observability.progress import Progress
from rlhf_ray.observability.sinks import Sink, read_jsonl
from rlhf_ray.observability.tracker_libraries import Connect, RunInfo, TrackedRun, configured

_current: ContextVar["Trackers | None"] = ContextVar("trackers", default=None)


class Tracker:
    """One tracker; once it fails, it is left alone until the next process."""

    def __init__(
        self, name: str, connect: Connect, info: RunInfo, memory: "Memory", samples: Samples
    ) -> None:
        self._name, self._memory, self._samples = name, memory, samples
        self._run: TrackedRun | None = None
        try:
            self._run = connect(info, memory.run_id(name))
            memory.begin(name, self._run.run_id)
            Progress().say(f"{name}: {self._run.where}")
        except Exception as error:
            self._give_up(error)

    def log(self, stream: str, axis: str, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the metrics of a step of a stream, unless they were told before."""
        self._tell(stream, step, lambda run: run.log(axis, step, metrics))

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tell a table of samples, unless it was told before, or may not be told such; its name is
        its stream."""
        local = self._run is not None and self._run.is_local
        if self._samples == "all" or (self._samples == "local" and local):
            self._tell(name, step, lambda run: run.table(name, step, rows))

    def forget(self, stream: str) -> None:
        """Tell a stream anew, from its first step."""
        if self._run is not None:
            self._memory.note(self._name, stream, -1)

    def close(self, failed: bool) -> None:
        """End the tracker's run."""
        if self._run is not None:
            try:
                self._run.close(failed)
            except Exception as error:
                self._give_up(error)

    def _tell(self, stream: str, step: int, tell: Callable[[TrackedRun], None]) -> None:
        if self._run is None or step <= self._memory.told(self._name, stream):
            return
        try:
            tell(self._run)
        except Exception as error:
            self._give_up(error)
        else:
            self._memory.note(self._name, stream, step)

    def _give_up(self, error: Exception) -> None:
        self._run = None
        # A Progress made now prints above a bar that is being shown.
        Progress().say(
            f"Warning: {self._name} failed ({type(error).__name__}: {error}). The run goes on "
            "without it; the next run in this folder tells it the numbers that it missed, from "
            "metrics.jsonl and eval.jsonl, but not the tables of completions (completions.jsonl)"
        )


class Memory:
    """``trackers.json``: ``{tracker: {run_id, told: {stream: step}}}``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._values = {}

    def run_id(self, tracker: str) -> str | None:
        """Id of the tracker's run; None where it has none yet."""
        return self._values.get(tracker, {}).get("run_id")

    def begin(self, tracker: str, run_id: str) -> None:
        """Note a tracker's run."""
        self._values.setdefault(tracker, {"told": {}})["run_id"] = run_id
        self._write()

    def told(self, tracker: str, stream: str) -> int:
        """Last step that was told; -1 where there was none."""
        return self._values[tracker]["told"].get(stream, -1)

    def note(self, tracker: str, stream: str, step: int) -> None:
        """Note the last step that was told."""
        self._values[tracker]["told"][stream] = step
        self._write()

    def _write(self) -> None:
        new = self._path.with_name(f"{self._path.name}.new")
        new.write_text(json.dumps(self._values, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self._path)


class TrackerSink:
    """A tracker as a stage's sink; names get ``prefix``, steps are of ``axis``."""

    def __init__(self, tracker: Tracker, stream: str, prefix: str, axis: str) -> None:
        self._tracker, self._stream, self._prefix, self._axis = tracker, stream, prefix, axis

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the tracker."""
        named = {f"{self._prefix}{name}": value for name, value in metrics.items()}
        self._tracker.log(self._stream, self._axis, step, named)

    def close(self) -> None:
        """Nothing: the tracker goes on with the next stage."""


class Trackers:
    """All trackers of a run."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def sinks(
        self, stage: str, step_key: str, records: Sequence[Mapping[str, Any]], part: str = ""
    ) -> list[Sink]:
        """A sink for each tracker, which catches up first with what it was not told.

        Args:
            stage: its name; PPO's metrics have names of their own, the others' get it as prefix.
            step_key: what the steps count, and the key of the step in ``records``.
            records: the stage's JSON lines so far.
            part: of the stage, where it tells the same step in several parts.
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

    def table(self, name: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tell every tracker a table."""
        for tracker in self._trackers:
            tracker.table(name, step, rows)

    def forget(self, stage: str) -> None:
        """A stage that was finished is done anew: its steps are told again."""
        for tracker in self._trackers:
            for stream in (stage, f"{stage}/eval"):
                tracker.forget(stream)

    def close(self, failed: bool) -> None:
        """End every tracker's run."""
        for tracker in self._trackers:
            tracker.close(failed)


@contextmanager
def tracking(config: Config, folder: Path) -> Iterator[None]:
    """The body of the ``with`` is followed by the trackers that the config turns on.

    Args:
        config: the run's.
        folder: the run's.

    Raises:
        ConfigError: the package of one is not installed.
    """
    chosen = configured(config.trackers)
    missing = [name for name in chosen if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"trackers.{missing[0]} is set, but the package {missing[0]} is not installed; run "
            f"pip install {' '.join(missing)}, or remove the key"
        )
    info = RunInfo(config.run.name, folder, masked(config.model_dump(mode="json")))
    memory = Memory(folder / "trackers.json")
    samples = config.trackers.samples
    trackers = Trackers(
        [Tracker(name, connect, info, memory, samples) for name, connect in chosen.items()]
    )
    token = _current.set(trackers)
    failed = True
    try:
        if chosen:
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
        # PPO's `Recorder`, and the supervised stages, tell them as this part.
        evaluations = read_jsonl(summary.with_name("eval.jsonl"))
        trackers.sinks(stage, step_key, evaluations, part="/eval")


def current() -> Trackers:
    """Those that follow this run; outside `tracking`, none."""
    return _current.get() or Trackers(())


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The registered metrics of a JSON line; what was not finite is null there, and left out."""
    return {
        name: value for name, value in record.items() if is_registered(name) and value is not None
    }
