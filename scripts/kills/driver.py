"""Run rlhf-ray with the edges of its phases written down, and held where a kill is to strike.

Usage: python -m kills.driver FOLDER COMMAND ...
    FOLDER     of the files by which the killer and the driver meet; it exists
    COMMAND    run CONFIG and so on

Every phase of PPO passes through one method of the recorder, so the product needs no hook of its
own.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_ray.driver.recorder import Recorder

EDGES, HOLD, HELD = "edges.jsonl", "hold", "held"
"""The edges reached so far; the edge at which to wait while the file is there; that it waits."""
POLL_S = 0.01


def report_edges(folder: Path) -> None:
    """Write down each edge of a phase; wait at that which the killer has named."""
    original, pid = Recorder.phase, os.getpid()

    def reach(edge: str, phase: str, iteration: int) -> None:
        record = {"at": time.time(), "pid": pid, "edge": edge, "phase": phase, "of": iteration}
        with (folder / EDGES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        hold = folder / HOLD
        if hold.exists() and hold.read_text(encoding="utf-8") == f"{edge} {phase} {iteration}":
            (folder / HELD).touch()
            while hold.exists():
                time.sleep(POLL_S)

    @contextmanager
    def reported(self: Recorder, name: str, iteration: int) -> Iterator[None]:
        reach("before", name, iteration)
        with original(self, name, iteration):
            yield
        reach("after", name, iteration)

    Recorder.phase = reported


if __name__ == "__main__":
    from rlhf_ray.cli import main

    report_edges(Path(sys.argv.pop(1)))
    main()
