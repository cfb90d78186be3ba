"""Runs a row in a process of its own, so that no row's memory, threads or imports touch another's.

The process writes the number of rounds that it will take and has taken into a file, which shows as
progress, and its figures into another one.
"""

import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.figures import NOT_RUN, Figure
from bench.rows import Row

SCRIPTS = Path(__file__).parents[1]
ROOT = SCRIPTS.parent
POLL_S = 0.2
LIMIT = 10
"""A row is ended after this many times its usual seconds, and `LEAST_LIMIT_S` at least."""
LEAST_LIMIT_S = 600.0
LOG_LINES = 4


@dataclass
class Place:
    """Where a row runs, and with which options."""

    folder: Path
    """The row's own, for its models and runs."""
    quick: bool = False
    gpu: bool = False
    trl: str = ""
    """Python of the environment that has TRL."""
    against: str = ""
    """Folder of the other checkout."""
    seed: int = 0
    _total: int = 0
    _done: int = 0

    def begin(self, rounds: int) -> None:
        """Say how many rounds there will be."""
        self._total = rounds
        self._show()

    def step(self) -> None:
        """Count a round."""
        self._done += 1
        self._show()

    def _show(self) -> None:
        shown = self.folder / "rounds.json"
        shown.with_suffix(".new").write_text(json.dumps([self._done, self._total]))
        shown.with_suffix(".new").replace(shown)


Result = dict[str, Any]
"""A row with its figures, as it stands in the JSON."""


def described(row: Row, gpu: bool) -> Result:
    """Return what is known of a row before it ran."""
    lines = [
        {"measure": line.measure, "against": line.against, "goal": line.goal and str(line.goal)}
        for line in row.lines
    ]
    known = {"name": row.name, "method": row.method, "uses": row.gpu if gpu and row.gpu else "CPU"}
    return {**known, "why": "", "failed": False, "lines": lines}


def not_run(row: Row, why: str, gpu: bool, failed: bool = False) -> Result:
    """Return a row without figures."""
    result = described(row, gpu)
    for line in result["lines"]:
        line |= {"value": None, "verdict": NOT_RUN}
    return result | {"why": why, "failed": failed}


def measured(row: Row, figures: Sequence[Figure], seconds: float, gpu: bool) -> Result:
    """Return a row with its figures."""
    result = described(row, gpu)
    for line, figure, shown in zip(row.lines, figures, result["lines"], strict=True):
        shown |= asdict(figure) | {"text": str(figure), "verdict": figure.verdict(line.goal)}
    return result | {"seconds": round(seconds, 1)}


def run(row: Row, place: Place, on_rounds: Callable[[int, int], None]) -> Result:
    """Run a row; return its figures, or why there are none.

    Args:
        row: to measure.
        place: with a new folder.
        on_rounds: called with the rounds done and the rounds in all.
    """
    began_s = time.monotonic()
    place.folder.mkdir(parents=True)
    options = {**asdict(place), "folder": str(place.folder)}
    paths = [str(SCRIPTS), str(ROOT), os.environ.get("PYTHONPATH", "")]
    with (place.folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.running", row.function, json.dumps(options)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            is_late = _watch(process, row, place, on_rounds)
        finally:
            _end(process)
    seconds = time.monotonic() - began_s
    results = place.folder / "figures.json"
    if is_late or not results.is_file():
        tail = (place.folder / "log.txt").read_text(errors="replace").splitlines()[-LOG_LINES:]
        how = "took too long" if is_late else f"ended with code {process.returncode}"
        why = f"{how} after {seconds:.0f} s: {' | '.join(tail)[-500:]}"
        return not_run(row, why, place.gpu, failed=True)
    figures = [Figure(**figure) for figure in json.loads(results.read_text())]
    return measured(row, figures, seconds, place.gpu)


def _watch(
    process: subprocess.Popen[bytes],
    row: Row,
    place: Place,
    on_rounds: Callable[[int, int], None],
) -> bool:
    """Wait until the process has ended, showing its rounds; return whether it takes too long."""
    began_s, shown = time.monotonic(), [0, 0]
    while process.poll() is None:
        if time.monotonic() - began_s > max(LEAST_LIMIT_S, LIMIT * row.seconds):
            return True
        with suppress(OSError, ValueError):
            rounds = json.loads((place.folder / "rounds.json").read_text())
            if rounds != shown:
                on_rounds(*rounds)
                shown = rounds
        time.sleep(POLL_S)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and all that it started; some leave its process group."""
    family: list[psutil.Process] = []
    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for each in family:
        with suppress(psutil.Error):
            each.kill()
    process.wait(LEAST_LIMIT_S)


def main(function: str, options: str) -> int:
    """Measure a row, given as its function and the fields of its place as JSON."""
    values = json.loads(options)
    place = Place(**values | {"folder": Path(values["folder"])})
    try:
        figures = pkgutil.resolve_name(function)(place)
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        return 1
    text = json.dumps([asdict(figure) for figure in figures])
    (place.folder / "figures.json").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
