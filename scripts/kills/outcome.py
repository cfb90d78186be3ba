"""What a run must be like in the end: whole records, an exact ledger, nothing left behind."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kills.inputs import BATCH_SIZE
from kills.processes import Marked

ENDS_S = 30.0
"""Seconds for processes and shared memory to be gone after the end of a run."""
POLL_S = 0.5


def read_summary(run: Path) -> dict[str, Any]:
    """Return the summary of a run's stage ppo; empty if it has not ended."""
    path = run / "ppo" / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def faults_of_records(run: Path, iterations: int) -> Iterator[str]:
    """Yield what is wrong with the records of a run that has ended."""
    lines = (run / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    recorded = [record["iteration"] for record in metrics]
    if recorded != list(range(1, iterations + 1)):
        yield f"metrics of the iterations {recorded}"
    versions = [record["policy/version"] for record in metrics]
    if versions != sorted(set(versions)):
        yield f"versions are not monotonic: {versions}"
    yield from faults_of_ledger(read_summary(run), iterations)


def faults_of_ledger(summary: Mapping[str, Any], iterations: int) -> Iterator[str]:
    """Yield what is wrong with a summary: a sample lost, learnt twice or discarded."""
    samples = iterations * BATCH_SIZE
    exact = {"drawn": samples, "learnt": samples, "discarded": 0, "filtered": 0, "in_flight": 0}
    if summary["iterations"] != iterations:
        yield f"{summary['iterations']} iterations of {iterations}"
    if summary["ledger"] != exact:
        yield f"ledger {summary['ledger']} instead of {exact}"


def faults_of_leftovers(marked: Marked) -> Iterator[str]:
    """Yield what processes of a run are left, and which shared memory, after some time."""
    deadline = time.monotonic() + ENDS_S
    while time.monotonic() < deadline and (marked.refresh() or marked.left_files()):
        time.sleep(POLL_S)
    if marked.refresh():
        yield f"processes left: {sorted(marked.titles().values())}"
    if files := marked.left_files():
        yield f"shared memory left: {files}"
