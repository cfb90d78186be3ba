#!/usr/bin/env python
"""Counts the files of this project that run in one step: how far a reader has to follow it.

    scripts/trace_path.py iteration   one PPO iteration, inline, on tiny models
    scripts/trace_path.py death       a generator's failed call, until its process starts again
    scripts/trace_path.py plan        rlhf-ray plan of the flagship config

A file counts where one of its functions runs; importing it doesn't count. ``--list`` names them.
"""

import argparse
import contextlib
import inspect
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
ROOMS = tuple(str(ROOT / package) + "/" for package in ("rlhf_ray", "actors"))


REPORTING = ("rlhf_ray/observability/", "rlhf_ray/driver/recorder.py")
"""Files that report a death; nobody has to read them to follow it."""


class Trail:
    """The files of ours in which a function has begun to run while the trail was on."""

    def __init__(self, under: str = "") -> None:
        """Follow calls made below a frame of the folder ``under``; empty: all calls."""
        self.files: set[str] = set()
        self._under = under

    def __enter__(self) -> "Trail":
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        file = _ours(frame)
        code = frame.f_code
        # The body of a module or of a class is no optimised code; comprehensions may be part of it.
        if file is None or event != "call" or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        if code.co_name.startswith("<"):
            return
        if any((_ours(caller) or "").startswith(self._under) for caller in _stack(frame)):
            self.files.add(file)


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _ours(frame: FrameType) -> str | None:
    file = frame.f_code.co_filename
    return str(Path(file).relative_to(ROOT)) if file.startswith(ROOMS) else None


def tiny_config(folder: Path) -> Any:
    """A run of all stages up to one iteration of PPO in this process, a few steps each."""
    from rlhf_ray.config import resolve

    shape = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    return resolve(
        {
            "run": {"dir": str(folder), "stages": ["prepare", "pretrain", "sft", "reward", "ppo"]},
            "cluster": {"mode": "inline"},
            "model": {"max_length": 128, "tiny": {**shape, "num_layers": 1}},
            "prepare": {"num_questions": 100},
            "data": {"max_bad_share": 0.9},
            "pretrain": {"steps": 2, "batch_size": 4, "block_size": 64},
            "sft": {"steps": 2, "batch_size": 4, "block_size": 64},
            "reward": {"steps": 2, "batch_size": 4, "eval_rows": 8},
            "generators": {"max_restarts": 1},
            "rollout": {
                "engine": "transformers",
                "max_prompt_tokens": 104,
                "max_tokens": 8,
                "shard_size": 8,
            },
            "ppo": {
                "iterations": 1,
                "batch_size": 8,
                "mini_batch_size": 8,
                "save_every": 1,
                "eval_every": 2,
                "eval_prompts": 8,
            },
        }
    )


def run_quietly(config: Any) -> None:
    """Run a pipeline without its progress."""
    from rlhf_ray.stages.pipeline import run

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(config)


def trace_iteration(folder: Path) -> set[str]:
    """Trace one iteration with its commit, its publication and its checkpoint."""
    from rlhf_ray.driver.ppo_loop import PpoLoop

    trail, iterate = Trail(), PpoLoop._iterate

    async def traced(loop: PpoLoop) -> None:
        with trail:
            await iterate(loop)

    with patch.object(PpoLoop, "_iterate", traced):
        run_quietly(tiny_config(folder))
    return trail.files


def trace_death(folder: Path) -> set[str]:
    """Trace the pool from the rollout that fails to the start of another process."""
    from actors.generator import Generator
    from rlhf_ray.driver.batches import Batches
    from rlhf_ray.errors import ActorFailure

    trail, stage = Trail(under="rlhf_ray/generators/"), "proof"
    scored, generate, make = Batches.scored, Generator.generate, Generator.__init__

    async def arm(batches: Batches, *args: Any) -> Any:
        nonlocal stage
        stage = "armed"
        return await scored(batches, *args)

    async def die(generator: Generator, request: Any) -> Any:
        nonlocal stage
        if stage != "armed":
            return await generate(generator, request)
        stage = "dead"
        trail.__enter__()
        raise ActorFailure("a generator died")

    def restart(generator: Generator, *args: Any) -> None:
        if stage == "dead":
            trail.__exit__()
        make(generator, *args)

    with (
        patch.object(Batches, "scored", arm),
        patch.object(Generator, "generate", die),
        patch.object(Generator, "__init__", restart),
    ):
        run_quietly(tiny_config(folder))
    return {file for file in trail.files if not file.startswith(REPORTING)}


def trace_plan(_: Path) -> set[str]:
    """The command line's plan of three nodes of eight GPUs."""
    from typer.testing import CliRunner

    from rlhf_ray.cli import app

    config = ROOT / "configs" / "stackllama" / "ppo_3x8_a100.yaml"
    command = ["plan", str(config), "--cluster", "3x8xA100-80GB"]
    with Trail() as trail:
        assert CliRunner().invoke(app, command).exit_code == 0
    return trail.files


GOALS = {"iteration": 45, "death": 8, "plan": 28}
"""How many files each may take."""

PATHS: dict[str, Callable[[Path], set[str]]] = {
    "iteration": trace_iteration,
    "death": trace_death,
    "plan": trace_plan,
}


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for a run, which goes with it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run"


def main() -> None:
    """Print the number of files on each path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", choices=list(PATHS), help="default: all of them")
    parser.add_argument("--list", action="store_true", help="name the files")
    options = parser.parse_args()
    for name in [options.path] if options.path else PATHS:
        with scratch() as folder:
            files = PATHS[name](folder)
        print(f"{name}: {len(files)} files (goal: at most {GOALS[name]})")
        if options.list:
            print("".join(f"  {file}\n" for file in sorted(files)), end="")


if __name__ == "__main__":
    main()
