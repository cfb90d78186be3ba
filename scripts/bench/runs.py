"""Local PPO runs of ours: every role a process, vLLM and DeepSpeed, as `rlhf-ray run` starts them.

What they are timed by is their trace: the driver's phases.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from bench import models
from bench.figures import Figure, of_rounds
from bench.running import LOG_LINES, ROOT, Place

ITERATIONS = 7
"""Of a run; the first, which also fills caches, and the last don't count: five are left."""
POLL_S = 0.05
HELD_OUT = 8
"""Prompts of the evaluation, which comes before the first iteration alone."""
LIMIT_S, END_S = 3600.0, 180.0
"""Seconds that a run may take, and its end."""
PUBLISH, COMMIT = ("sync",), ("commit", "save")
"""Phases of the driver."""


@dataclass(frozen=True)
class Inputs:
    """What a run reads, the same for both sides of a comparison."""

    size: models.Size
    policy: str
    reward: str
    prompts: str


def write_inputs(folder: Path, size: models.Size, seed: int) -> Inputs:
    """Write models and prompts into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    policy = models.write(folder / "policy", size, seed)
    return Inputs(
        size,
        policy,
        models.write_reward_model(folder / "reward", policy, size),
        models.write_prompts(folder / "prompts.jsonl", models.NUM_PROMPTS + HELD_OUT, seed),
    )


def ppo_values(inputs: Inputs, folder: Path, *, skewed: bool, gpu: bool) -> dict[str, Any]:
    """Return the config of a run; what it doesn't name is the default."""
    length = models.MAX_LENGTH if skewed or gpu else 64
    values: dict[str, Any] = {
        "run": {"name": "bench", "dir": str(folder), "stages": ["ppo"]},
        "cluster": {"mode": "local", "dashboard": False},
        "model": {"path": inputs.policy, "dtype": inputs.size.name, "max_length": 512},
        "sft": {"path": inputs.policy},
        "reward": {"path": inputs.reward},
        "critic": {"init": "sft"},
        "data": {"prompts": {"path": inputs.prompts}},
        "lora": {"r": models.LORA_RANK},
        "rollout": {
            "max_prompt_tokens": models.PROMPT_TOKENS,
            "max_tokens": length,
            "ignore_eos": not skewed,
        },
        "ppo": {
            "iterations": ITERATIONS,
            "batch_size": models.NUM_PROMPTS,
            "epochs": 2,
            "eval_every": 10**6,
            "eval_prompts": HELD_OUT,
        },
    }
    if gpu:
        values["placement"] = {"gpus": 0.2}
        values["rollout"]["engine_args"] = {"gpu_memory_utilization": 0.3}
    return values


def run(
    values: Mapping[str, Any],
    code: str | Path = ROOT,
    until: Callable[[Path], bool] | None = None,
) -> float:
    """Run a config in a process of its own; return its seconds.

    Args:
        values: the config; its ``run.dir`` doesn't exist yet.
        code: checkout to run.
        until: says whether the run's folder holds what was waited for: the run is then ended.

    Raises:
        RuntimeError: it failed.
    """
    folder = Path(values["run"]["dir"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
    return command(["run", str(config)], folder, code, until)


def command(
    arguments: Sequence[str],
    folder: Path,
    code: str | Path = ROOT,
    until: Callable[[Path], bool] | None = None,
) -> float:
    """Run a command of `rlhf-ray`, as `run` does; its output goes beside the folder."""
    log = folder.with_suffix(".txt")
    began_s = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_ray", *arguments],
            env={**os.environ, "PYTHONPATH": str(code)},
            cwd=code,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        is_there = False
        while process.poll() is None and not is_there and time.monotonic() - began_s < LIMIT_S:
            is_there = until is not None and until(folder)
            time.sleep(POLL_S)
        seconds = time.monotonic() - began_s
        process.terminate()  # it ends its own processes
        ended = process.wait(END_S)
    if ended and not is_there:
        tail = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        raise RuntimeError(f"rlhf-ray {' '.join(arguments)} failed: {' | '.join(tail)}")
    return seconds


def phases(folder: Path) -> dict[int, dict[str, tuple[float, float]]]:
    """Return start and end of the driver's phases by iteration, Unix seconds."""
    text = (folder / "trace.json").read_text(encoding="utf-8").rstrip().rstrip(",")
    events = json.loads(text if text.endswith("]") else f"{text}]")
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[int, dict[str, tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X" and rows[event["tid"]] in ("driver", "disk"):
            start_s = event["ts"] / 1e6
            by_name = found.setdefault(event["args"]["iteration"], {})
            by_name[event["name"]] = (start_s, start_s + event["dur"] / 1e6)
    return found


def iteration_seconds(folder: Path) -> list[float]:
    """Return the time from one rollout phase to the next, without the first iteration's."""
    starts = [phase["gen"][0] for _, phase in sorted(phases(folder).items()) if "gen" in phase]
    return [end - start for start, end in pairwise(starts[1:])]


def shares(place: Place) -> list[Figure]:
    """Return the shares of an iteration that publishing and committing take."""
    place.begin(2)
    size = models.LARGE if place.gpu else models.SMALL
    inputs = write_inputs(place.folder / "inputs", size, place.seed)
    place.step()
    folder = place.folder / "run"
    values = ppo_values(inputs, folder, skewed=False, gpu=place.gpu)
    run(values)
    place.step()
    lengths, by_iteration = iteration_seconds(folder), sorted(phases(folder).items())[1:]

    def share(names: Sequence[str]) -> Figure:
        seconds = [
            sum(end - start for name, (start, end) in each.items() if name in names)
            for _, each in by_iteration[: len(lengths)]
        ]
        ratios = [each / whole for each, whole in zip(seconds, lengths, strict=True)]
        return of_rounds(ratios, seconds=median(seconds), iteration_s=median(lengths))

    return [share(PUBLISH), share(COMMIT)]
