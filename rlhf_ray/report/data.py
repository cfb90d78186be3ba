"""Read a run's folder for the report; missing and torn parts are left out."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.config import stages
from rlhf_ray.config.section import is_mapping, masked
from rlhf_ray.config.yaml_values import parsed
from rlhf_ray.errors import DataError, RlhfError
from rlhf_ray.models.folders import first_line
from rlhf_ray.observability.samples.reading import Query, Samples
from rlhf_ray.observability.sinks import record_of
from rlhf_ray.observability.tracing import Span, phase_totals, read_spans

STAGES = tuple(stage for stage in stages.STAGES if stage != "report")

Record = Mapping[str, Any]
T = TypeVar("T")

_UNREADABLE = (OSError, ValueError, LookupError, TypeError, RecursionError, ArithmeticError)
"""What reading a damaged file raises: it is a folder, is no text, nests too deeply, lacks a key."""
_LAST_BYTES = 2**20
_HIGHEST = 3


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's files."""

    name: str
    """Name of the run, else of its folder."""
    started: datetime | None
    """Start of the first span, else when config.yaml was written; local time."""
    config: Record
    """Resolved config without secrets; empty where there is none."""
    odd: Mapping[str, str]
    """Damaged files, with what is wrong with each; the rest is shown without them."""
    summaries: Mapping[str, Record]
    """summary.json by stage; only of finished stages."""
    metrics: Mapping[str, Sequence[Record]]
    """metrics.jsonl by stage; only where there are records."""
    evaluations: Sequence[Record]
    """ppo/eval.jsonl."""
    completions: Sequence[Record]
    """The last ones of ppo/completions.jsonl, which may have gigabytes."""
    warnings: Sequence[Record]
    """ppo/warnings.jsonl, written by the guards."""
    outages: Sequence[Record]
    """ppo/outages.jsonl: restarts and lost time, over all processes of the run."""
    samples: Sequence[Record]
    """evaluate/samples.jsonl."""
    instructions: Sequence[Record]
    """evaluate/instructions.jsonl."""
    quality: Mapping[str, Record]
    """Statistics of the texts: prepare/quality.json, and data/<key>.json of user datasets."""
    spans: Sequence[Span]
    """trace.json."""
    phase_totals: Mapping[str, Mapping[str, float]]
    """Own seconds by row and span name."""
    changes: Sequence[Record] = ()
    """changes.jsonl: what was changed on resume, and after which iteration or step."""
    highest: Mapping[str, Sequence[Record]] = field(default_factory=dict[str, Sequence[Record]])
    """The recorded samples with the highest `score` and `kl`."""
    state: str = ""
    """What status.json last said of the run: running, stopped, finished or failed."""
    origin: Record = field(default_factory=dict[str, Any])
    """branch.json: the run and version that this one was branched from."""

    @property
    def is_empty(self) -> bool:
        """Whether the folder holds nothing of a run."""
        return not (self.config or self.summaries or self.metrics)

    def option(self, dotted: str) -> Any:
        """Return the value of a config key such as ``ppo.iterations``; None if absent."""
        value: object = self.config
        for key in dotted.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def pending(self) -> list[str]:
        """Return the stages of the config that come after the last finished one."""
        planned = self.option("run.stages") or stages.DEFAULT_STAGES
        done = [STAGES.index(stage) for stage in self.summaries]
        first = max(done, default=-1) + 1
        return [stage for stage in STAGES[first:] if stage in planned and not self._external(stage)]

    def _external(self, stage: str) -> bool:
        return stage in ("sft", "reward") and bool(self.option(f"{stage}.path"))


def read_run(run_dir: Path) -> RunFiles:
    """Read a run's folder.

    Raises:
        DataError: the folder does not exist or holds nothing of a run.
    """
    if not run_dir.is_dir():
        raise DataError(f"No run folder at {run_dir}: give the run.dir of a run (runs/<run.name>).")
    files = read(run_dir)
    if files.is_empty:
        raise DataError(
            f"{run_dir} holds neither config.yaml nor a stage's summary.json or metrics.jsonl: "
            "give the run.dir of a run (runs/<run.name>)."
        )
    return files


def read(run_dir: Path) -> RunFiles:
    """Read a run's folder."""
    odd: dict[str, str] = {}

    def from_file(name: str, read_one: Callable[[Path], T], otherwise: T) -> T:
        """Return what a file holds; name a file that is damaged instead of failing for it."""
        try:
            return read_one(run_dir / name)
        except FileNotFoundError:
            return otherwise
        except (*_UNREADABLE, RlhfError) as error:
            odd[name] = f"cannot be read: {first_line(error)}"
            return otherwise

    def lines(
        name: str, read_some: Callable[[Path], tuple[list[Record], int]] = _read_lines
    ) -> list[Record]:
        records, num_odd = from_file(name, read_some, ([], 0))
        if num_odd:
            odd[name] = f"{num_odd} lines are no JSON objects and are left out"
        return records

    def record(name: str) -> Record:
        return from_file(name, _read_json, {})

    config = masked(from_file("config.yaml", _read_config, {}), hidden="(hidden)")
    spans = from_file("trace.json", read_spans, [])
    summaries = {stage: record(f"{stage}/summary.json") for stage in STAGES}
    metrics = {stage: lines(f"{stage}/metrics.jsonl") for stage in STAGES}
    name = _name(config)
    return RunFiles(
        name=str(name or run_dir.resolve().name),
        started=_started(spans, run_dir / "config.yaml"),
        config=config,
        odd=odd,
        summaries={stage: summary for stage, summary in summaries.items() if summary},
        metrics={stage: records for stage, records in metrics.items() if records},
        evaluations=lines("ppo/eval.jsonl"),
        completions=lines("ppo/completions.jsonl", _read_last_lines),
        warnings=lines("ppo/warnings.jsonl"),
        outages=lines("ppo/outages.jsonl"),
        samples=lines("evaluate/samples.jsonl"),
        instructions=lines("evaluate/instructions.jsonl"),
        quality={of: found for of, path in _statistics(run_dir).items() if (found := record(path))},
        spans=spans,
        phase_totals=phase_totals(spans),
        changes=lines("changes.jsonl"),
        highest={name: _highest(run_dir / "ppo", name) for name in ("score", "kl")},
        origin=record("branch.json"),
        state=_state(record("status.json")),
    )


def _highest(stage: Path, name: str) -> list[Record]:
    """Return the samples with the highest values of a column; none where no index is recorded."""
    samples = Samples(stage)
    try:
        rows = samples.find(Query(sort=name), size=_HIGHEST).rows
        found = [samples.record(row) for row in rows]
    except (DataError, *_UNREADABLE):
        return []
    return [record for record in found if record is not None]


def number(record: Record | None, *keys: str) -> float | None:
    """Return the finite number at ``record[key][key]...``; None if there is none."""
    value: object = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _state(saved: Record) -> str:
    status = saved.get("status")
    return str(status.get("state", "")) if is_mapping(status) else ""


def _name(config: Record) -> object:
    run = config.get("run")
    return run.get("name") if isinstance(run, dict) else None


def _statistics(run_dir: Path) -> dict[str, str]:
    """Return the files with statistics of texts, by what these are of."""
    own = sorted((run_dir / "data").glob("*.json"))
    return {"prepare": "prepare/quality.json"} | {
        f"data.{path.stem}": f"data/{path.name}" for path in own
    }


def _read_config(path: Path) -> Record:
    value = parsed(path.read_text(encoding="utf-8"), path.name)
    if value is None or is_mapping(value):
        return value or {}
    raise ValueError("it is no mapping")


def _read_json(path: Path) -> Record:
    value = json.loads(path.read_text(encoding="utf-8"))
    if is_mapping(value):
        return value
    raise ValueError("it is no JSON object")


def _read_last_lines(path: Path) -> tuple[list[Record], int]:
    """Return the records in the last `_LAST_BYTES` of a file, and how many lines hold none."""
    with path.open("rb") as file:
        begin = max(0, path.stat().st_size - _LAST_BYTES)
        file.seek(begin)
        text = file.read().decode(errors="replace")
    return _records(text.partition("\n")[2] if begin else text)  # the first may be part of a line


def _read_lines(path: Path) -> tuple[list[Record], int]:
    """Return the records, and how many lines hold none."""
    return _records(path.read_text(encoding="utf-8", errors="replace"))


def _records(text: str) -> tuple[list[Record], int]:
    """Return the records of lines, and how many hold none; the last one may be torn by a kill."""
    *whole, last = [(line, record_of(line)) for line in text.split("\n")]
    num_odd = sum(record is None for line, record in whole if line.strip())
    return [record for _, record in (*whole, last) if record is not None], num_odd


def _started(spans: Sequence[Span], config: Path) -> datetime | None:
    with suppress(OSError, ValueError, OverflowError):  # no config.yaml; a time that is no date
        return datetime.fromtimestamp(
            min(span.start_s for span in spans) if spans else config.stat().st_mtime
        )
    return None
