"""Run PPO in a process that is killed; a module of its own, so that the process finds it."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from kill_at_phase import die_at

from rlhf_ray.config import Config
from rlhf_ray.driver.recorder import Recorder
from rlhf_ray.stages import pipeline

Death = tuple[str, str, int]
"""Edge, phase and iteration at which a driver kills itself."""


def drive(config: Config, death: Death | None, begun: Connection, log: Path) -> None:
    """Run a config on one thread, up to its end or to its death; report its first phase."""
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    if death is not None:
        die_at(*death)
    _report_first_phase(begun)
    pipeline.run(config)


def _report_first_phase(begun: Connection) -> None:
    original = Recorder.phase

    @contextmanager
    def reported(self: Recorder, name: str, at: int) -> Iterator[None]:
        if not begun.closed:
            begun.send(None)
            begun.close()
        with original(self, name, at):
            yield

    Recorder.phase = reported
