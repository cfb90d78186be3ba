"""The tables that `rlhf-ray list` and `rlhf-ray status` print."""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rlhf_ray.jobs.job_server import Job
from rlhf_ray.observability.progress import clock_time
from rlhf_ray.runs.status import RunStatus
from rlhf_ray.secrecy import printable


def list_table(jobs: Sequence[Job]) -> Table:
    """Return a table with a row for each run."""
    table = _table("run", "submission id", "status", "started", "duration", "folder")
    for job in jobs:
        duration = (job.ended or time.time()) - job.started
        started = datetime.fromtimestamp(job.started).strftime("%Y-%m-%d %H:%M:%S")
        shown = (job.name or "-", job.id, job.status.lower(), started, clock_time(duration))
        table.add_row(*_cells(*shown, job.folder or "-"))
    return table


def status_table(status: RunStatus) -> Group:
    """Return the facts of a run's status, and a row for each of its generators."""
    facts = Table.grid(padding=(0, 2))
    for name, text in _facts(status):
        facts.add_row(*_cells(name, text))
    if not status.generators:
        return Group(facts)
    table = _table("generator", "state", "version", "restarts")
    for generator in status.generators:
        version = "-" if generator.version is None else str(generator.version)
        cells = _cells(generator.name, generator.state, version, str(generator.restarts))
        table.add_row(*cells)
    return Group(facts, table)


def _facts(status: RunStatus) -> list[tuple[str, str]]:
    age = clock_time(max(0.0, time.time() - status.updated))
    facts: list[tuple[str, str | None]] = [
        ("run", f"{status.name} in {status.folder}"),
        ("state", f"{status.state}, reported {age} ago"),
        ("message", status.message),
        ("stage", status.stage),
        ("progress", status.progress),
        ("ETA", None if status.eta_s is None else clock_time(status.eta_s)),
        ("reward", _number(status.reward)),
        ("kl", _number(status.kl)),
        ("version", None if status.version is None else str(status.version)),
        ("s/iteration", _number(status.seconds_per_iteration)),
        ("restarts", _counts(status.restarts or {})),
        ("useful time", _share(status.effective_time_ratio)),
    ]
    return [(name, text) for name, text in facts if text is not None]


def _counts(numbers: Mapping[str, int]) -> str | None:
    return ", ".join(f"{name} {number}" for name, number in numbers.items()) or None


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.1%}"


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}"


def _cells(*texts: str) -> list[Text]:
    """Return texts as they are: a run's name in brackets is no markup, and sets no colour."""
    return [Text(printable(text)) for text in texts]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
