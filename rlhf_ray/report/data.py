"""Read a run's folder for the report; missing and torn parts are left out."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from rlhf_ray.config import stages
from rlhf_ray.observability.sinks import read_jsonl
from rlhf_ray.observability.tracing import Span, phase_totals, read_spans

STAGES = tuple(stage for stage in stages.STAGES if stage != "report")

Record = Mapping[str, Any]

# Names of environment variables that hold credentials (cluster.env may carry them).
_SECRET = re.compile(
    r"^(\s*[A-Z][A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|KEY|CREDENTIALS)\s*:\s*).+$", re.MULTILINE
)


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run's files."""

    name: str
    """Name of the run, else of its folder."""
    started: datetime | None
    """Start of the first span, else when config.yaml was written; local time."""
    config: Record
    """Resolved config; empty where there is none."""
    config_text: str
    """config.yaml as written, credentials hidden."""
    summaries: Mapping[str, Record]
    """summary.json by stage; only of finished stages."""
    metrics: Mapping[str, Sequence[Record]]
    """metrics.jsonl by stage; only where there are records."""
    evaluations: Sequence[Record]
    """ppo/eval.jsonl."""
    completions: Sequence[Record]
    """ppo/completions.jsonl."""
    warnings: Sequence[Record]
    """ppo/warnings.jsonl, written by the guards."""
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


def read(run_dir: Path) -> RunFiles:
    """Read a run's folder."""
    config, config_text = _read_config(run_dir / "config.yaml")
    spans = read_spans(run_dir / "trace.json")
    summaries = {stage: _read_json(run_dir / stage / "summary.json") for stage in STAGES}
    metrics = {stage: read_jsonl(run_dir / stage / "metrics.jsonl") for stage in STAGES}
    run = config.get("run")
    name = run.get("name") if isinstance(run, dict) else None
    return RunFiles(
        name=str(name or run_dir.resolve().name),
        started=_started(spans, run_dir / "config.yaml"),
        config=config,
        config_text=_SECRET.sub(r"\1(hidden)", config_text),
        summaries={stage: summary for stage, summary in summaries.items() if summary},
        metrics={stage: records for stage, records in metrics.items() if records},
        evaluations=read_jsonl(run_dir / "ppo" / "eval.jsonl"),
        completions=read_jsonl(run_dir / "ppo" / "completions.jsonl"),
        warnings=read_jsonl(run_dir / "ppo" / "warnings.jsonl"),
        samples=read_jsonl(run_dir / "evaluate" / "samples.jsonl"),
        instructions=read_jsonl(run_dir / "evaluate" / "instructions.jsonl"),
        quality=_read_quality(run_dir),
        spans=spans,
        phase_totals=phase_totals(run_dir / "trace.json"),
    )


def number(record: Record | None, *keys: str) -> float | None:
    """Return the finite number at ``record[key][key]...``; None if there is none."""
    value: object = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _read_quality(run_dir: Path) -> dict[str, Record]:
    own = sorted((run_dir / "data").glob("*.json"))
    sets = {"prepare": run_dir / "prepare" / "quality.json"}
    sets |= {f"data.{path.stem}": path for path in own}
    return {name: record for name, path in sets.items() if (record := _read_json(path))}


def _read_config(path: Path) -> tuple[Record, str]:
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (FileNotFoundError, yaml.YAMLError):
        return {}, ""
    return (config, text) if isinstance(config, dict) else ({}, "")


def _read_json(path: Path) -> Record:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def _started(spans: Sequence[Span], config: Path) -> datetime | None:
    if spans:
        return datetime.fromtimestamp(min(span.start_s for span in spans))
    return datetime.fromtimestamp(config.stat().st_mtime) if config.exists() else None
