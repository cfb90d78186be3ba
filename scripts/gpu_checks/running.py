"""Runs cases as processes with time limits, step by step, and reads their lines as they come."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

import psutil

from gpu_checks.cases import Case
from gpu_checks.lines import FAIL, Line, append, read

INTERVAL_S = 0.2
CORES_PER_CASE = 4
ENDS_S = 15
"""Seconds that a case gets to end its own processes after its time limit."""
LOG_LINES = 5
SCRIPTS = Path(__file__).parents[1]


@dataclass
class Running:
    """A case in a process of its own."""

    case: Case
    folder: Path
    seconds: float
    """Its time limit."""
    started: float = field(default_factory=time.monotonic)
    shown: int = 0

    def __post_init__(self) -> None:
        self.lines = self.folder / "lines" / f"{self.case.name}.jsonl"
        self.log = self.folder / "logs" / f"{self.case.name}.txt"
        for path in (self.lines, self.log):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
        case = json.dumps(asdict(self.case))
        command = [sys.executable, "-m", "gpu_checks.cases", case]
        given = os.environ.get("PYTHONPATH")
        paths = [str(SCRIPTS), str(SCRIPTS.parent), *([given] if given else [])]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(self.folder), str(self.lines)],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(paths),
                    # Cases look at the GPU before they start vLLM, whose forks could not use it.
                    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def new_lines(self) -> Iterator[Line]:
        """Yield the lines that have come since the last call."""
        lines = list(read(self.lines))
        yield from lines[self.shown :]
        self.shown = len(lines)

    def is_over(self) -> bool:
        """Return whether it has ended; end it where it is over its limit."""
        late = time.monotonic() - self.started > self.seconds
        if self.process.poll() is None and not late:
            return False
        if late:
            append(self.lines, self._failed(f"over its time limit of {self.seconds:.0f} s"))
        elif self.process.returncode and not any(line.verdict == FAIL for line in read(self.lines)):
            append(self.lines, self._failed(f"ended with code {self.process.returncode}"))
        self._end()
        return True

    def _failed(self, why: str) -> Line:
        tail = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        numbers = {"log": " | ".join(tail)[-600:]}
        return Line(FAIL, why, numbers, self.case.step, self.case.name)

    def _end(self) -> None:
        """End the process and all that it started; Ray's and vLLM's leave its process group."""
        with suppress(psutil.Error):
            family = psutil.Process(self.process.pid).children(recursive=True)
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(ENDS_S)
            for process in family:
                with suppress(psutil.Error):
                    process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(cases: Sequence[Case], folder: Path, limit_s: float) -> Iterator[Line]:
    """Run cases step by step; yield their lines as they come.

    Args:
        cases: in the order of their steps.
        folder: for models, runs, logs and lines.
        limit_s: seconds of all cases; those that it leaves no time for fail as not run.
    """
    started = time.monotonic()
    at_once = max(1, (os.cpu_count() or 1) // CORES_PER_CASE)
    for _, step in groupby(cases, key=lambda case: case.step):
        waiting, running = list(step), list[Running]()
        while waiting or running:
            left = limit_s - (time.monotonic() - started)
            while waiting and left <= 0:
                case = waiting.pop(0)
                why = f"not run: the {limit_s:.0f} s of the whole check are over"
                yield Line(FAIL, why, {}, case.step, case.name)
            while waiting and len(running) < (1 if waiting[0].alone else at_once):
                case = waiting.pop(0)
                running.append(Running(case, folder, min(case.limit_s, left)))
            for each in list(running):
                if each.is_over():
                    running.remove(each)
                yield from each.new_lines()
            time.sleep(INTERVAL_S)
