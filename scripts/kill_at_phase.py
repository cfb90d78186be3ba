"""Run a command of rlhf-ray whose driver kills itself at the edge of a phase of PPO.

Usage: python scripts/kill_at_phase.py EDGE PHASE ITERATION COMMAND ...
    EDGE       before or after
    PHASE      gen, score, learn, commit, sync, save or eval
    COMMAND    run CONFIG and so on

Every phase passes through one method of the recorder, so the product needs no hook of its own.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_ray.driver.recorder import Recorder

PHASES = ("gen", "score", "learn", "commit", "sync", "save", "eval")
EDGES = ("before", "after")


def die_at(edge: str, phase: str, iteration: int) -> None:
    """Make this process kill itself, by SIGKILL, before or after a phase of an iteration."""
    assert edge in EDGES, edge
    assert phase in PHASES, phase
    original = Recorder.phase

    @contextmanager
    def deadly(self: Recorder, name: str, at: int) -> Iterator[None]:
        is_it = (name, at) == (phase, iteration)
        if is_it and edge == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        with original(self, name, at):
            yield
        if is_it:
            os.kill(os.getpid(), signal.SIGKILL)

    Recorder.phase = deadly


if __name__ == "__main__":
    from rlhf_ray.cli import main

    die_at(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    del sys.argv[1:4]
    main()
