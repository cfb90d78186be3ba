"""The records of the PPO loop: metrics, completions, evaluations, warnings and spans."""

import math
import shutil
import time
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_ray.config.trackers import TrackersConfig
from rlhf_ray.observability.outages import Outages
from rlhf_ray.observability.samples.writing import SampleWriter
from rlhf_ray.observability.sinks import JsonlSink, Sink, Sinks, TensorBoardSink, read_jsonl
from rlhf_ray.observability.tracing import BusyTime, Tracer, unix_now
from rlhf_ray.observability.trackers import current, numbers
from rlhf_ray.types import GeneratorsReport

IN_TABLE = 4
"""Samples of an iteration in the tables of trackers."""
TABLE = ("iteration", "prompt", "response", "score", "length", "finish_reason")
"""Columns of these tables."""
BESIDE = "save"
"""Phase that runs beside those of the next iteration, and so has its own row in the trace."""


class Recorder:
    """Writes the PPO stage's records; truncates them to the last commit when a run resumes."""

    def __init__(
        self,
        folder: Path,
        tracer: Tracer,
        settings: TrackersConfig,
        resume_after: int | None,
        live: Sequence[Sink] = (),
        sources: Sequence[str] = (),
    ) -> None:
        """
        Args:
            folder: the stage's folder.
            tracer: the run's tracer.
            settings: which trackers get the records besides the files in the folder.
            resume_after: last iteration whose records are kept; None: a new run.
            live: sinks that show current values; they also get values that no file keeps.
            sources: names of the reward sources.
        """
        self.folder = folder
        self._metrics, self._evals, self._warnings = (
            JsonlSink(folder / name) for name in ("metrics.jsonl", "eval.jsonl", "warnings.jsonl")
        )
        self.outages = Outages(folder / "outages.jsonl")
        # Iterations after the commit are run again: without the cut they would be recorded twice.
        kept = -1 if resume_after is None else resume_after
        for sink in (self._metrics, self._evals, self._warnings):
            sink.truncate_after("iteration", kept)
        self._completions = SampleWriter(folder, sources, kept)
        local: list[Sink] = []
        if settings.tensorboard:
            local.append(TensorBoardSink(folder / "tensorboard", purge_step=kept + 1))
        # After the truncation: trackers that missed records get them from the files.
        tracked = current().sinks("ppo", "iteration", self.history())
        tracked_evals = current().sinks("ppo", "iteration", self._evals.records(), part="/eval")
        self._sinks = Sinks([self._metrics, *local, *tracked, *live])
        self._eval_sinks = Sinks([*local, *tracked_evals, *live])
        self._live = Sinks(live)
        self._busy = BusyTime(unix_now())
        self._completions_every = settings.completions_every
        self._tracer = tracer
        self.seen_at = tracer.seen_at
        self._iteration = max(kept, 0)
        self._seconds: dict[str, float] = {}
        num_changes = len(read_jsonl(folder.parent / "changes.jsonl"))
        self._changes = {"config/changes": float(num_changes)} if num_changes else {}

    @contextmanager
    def phase(self, name: str, iteration: int) -> Generator[None]:
        """Time a phase of an iteration, for the iteration's metrics and the trace."""
        # The phase that runs beside another iteration ends in that one.
        self._iteration = max(self._iteration, iteration)
        started = unix_now()
        try:
            yield
        finally:
            ended = unix_now()
            self._seconds[name] = self._seconds.get(name, 0.0) + ended - started
            row = "disk" if name == BESIDE else "driver"
            self._tracer.add(row, name, started, ended, iteration=iteration)

    def span(self, actor: str, name: str, started: float, ended: float) -> None:
        """Record an actor's call from ``started`` to ``ended``, Unix seconds."""
        self._tracer.add(actor, name, started, ended, iteration=self._iteration)
        self._busy.add(actor, started, ended)

    def committed(self, account: Mapping[str, float]) -> None:
        """Show the current time as that of the last commit, with the run's account so far."""
        restarts = {f"restarts/{role}": num for role, num in self.outages.restarts.items()}
        lost_s = {f"lost_s/{cause}": seconds for cause, seconds in self.outages.lost_s.items()}
        now = {"commit/time": time.time()}
        self._live.log(self._iteration, {**now, **restarts, **lost_s, **account})

    def stalled(self, is_stalled: bool) -> None:
        """Show whether the watchdog misses a commit."""
        self._live.log(self._iteration, {"commit/stalled": float(is_stalled)})

    def generators(self, report: GeneratorsReport, names: Collection[str]) -> None:
        """Show the number of generators now; stop showing those that are not among ``names``."""
        counts = {"generators/ready": report.ready, "generators/target": report.target}
        known = [actor for actor in self._busy.actors() if actor.startswith("generator-")]
        left = [actor for actor in known if actor not in names]
        for actor in left:
            self._busy.forget(actor)
        gone = {f"actors/busy/{actor}": math.nan for actor in left}
        self._live.log(self._iteration, {**counts, **gone})

    def log(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Record an iteration's metrics, with the times of its phases."""
        times = {f"timing_s/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        self._sinks.log(iteration, {**metrics, **times, **self._changes})
        disk = shutil.disk_usage(self.folder)
        busy = self._busy.shares(unix_now())
        self._live.log(
            iteration,
            {
                "disk/free": disk.free,
                "disk/free_share": disk.free / disk.total,
                **{f"actors/busy/{actor}": share for actor, share in busy.items()},
            },
        )

    def completions(self, iteration: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Record an iteration's samples (`driver.records.samples`)."""
        self._completions.append(records)
        if iteration % self._completions_every == 0:
            rows = [{name: record[name] for name in TABLE} for record in records[:IN_TABLE]]
            current().table("completions", iteration, rows)

    def warning(self, record: Mapping[str, object]) -> None:
        """Record a guard's warning."""
        self._warnings.append(record)

    def warnings(self) -> list[dict[str, object]]:
        """Return all warnings so far, including those of earlier processes."""
        return self._warnings.records()

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """Record a held-out evaluation with its table of samples."""
        self._evals.append(record)
        self._eval_sinks.log(record["iteration"], numbers(record))

    def has_evaluation(self, iteration: int) -> bool:
        """Return whether the version of an iteration was evaluated."""
        return any(record["iteration"] == iteration for record in self._evals.records())

    def history(self) -> list[dict[str, Any]]:
        """Return the metrics of all iterations so far."""
        return self._metrics.records()

    def flush(self) -> None:
        """Write the records that a full disk has refused.

        Raises:
            OSError: it still does.
        """
        for sink in (self._metrics, self._evals, self._completions, self._warnings):
            sink.flush()

    def sync(self) -> None:
        """Make the records so far durable; may be called in another thread."""
        for sink in (self._metrics, self._evals, self._completions, self._warnings):
            sink.sync()

    def close(self) -> None:
        """Flush and close all files and trackers."""
        self._sinks.close()
        self._evals.close()
        self._completions.close()
        self._warnings.close()
        self.outages.close()
