"""Rows against TRL's PPO: the same model, prompts, lengths and libraries on both sides."""

import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench import models, runs
from bench.figures import Figure
from bench.running import LOG_LINES, ROOT, Place

ALTERNATIONS = 2
RUN_S = 3600


def uniform(place: Place) -> list[Figure]:
    """Compare with responses of one length."""
    return _compare(place, models.SMALL, skewed=False)


def skewed(place: Place) -> list[Figure]:
    """Compare with geometric lengths."""
    return _compare(place, models.SMALL, skewed=True)


def uniform_20m(place: Place) -> list[Figure]:
    """Compare with a larger model and responses of one length."""
    return _compare(place, models.MIDDLE, skewed=False)


def skewed_20m(place: Place) -> list[Figure]:
    """Compare with a larger model and geometric lengths."""
    return _compare(place, models.MIDDLE, skewed=True)


def _compare(place: Place, size: models.Size, *, skewed: bool) -> list[Figure]:
    size = models.LARGE if place.gpu else size
    place.begin(2 * ALTERNATIONS)
    inputs = runs.write_inputs(place.folder / "inputs", size, place.seed)
    sides: tuple[list[float], list[float]] = ([], [])
    lengths = list[float]()
    for number in range(ALTERNATIONS):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            if which == 0:
                folder = place.folder / f"ours-{number}"
                runs.run(runs.ppo_values(inputs, folder, skewed=skewed, gpu=place.gpu))
                sides[0].append(median(runs.iteration_seconds(folder)))
                lengths.append(_mean_length(folder))
            else:
                sides[1].append(median(_trl_seconds(place, inputs, number, skewed=skewed)))
            place.step()
    ours, theirs = sides
    ratios = [their_s / our_s for our_s, their_s in zip(ours, theirs, strict=True)]
    details = {
        "ours_episodes_per_s": [models.NUM_PROMPTS / each for each in ours],
        "trl_episodes_per_s": [models.NUM_PROMPTS / each for each in theirs],
        "our_mean_response_tokens": lengths,
    }
    return [Figure(sum(ratios) / len(ratios), min(ratios), max(ratios), details)]


def _mean_length(folder: Path) -> float:
    lines = (folder / "ppo" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lengths = [json.loads(line)["response_length/mean"] for line in lines]
    return sum(lengths) / len(lengths)


def _trl_seconds(place: Place, inputs: runs.Inputs, number: int, *, skewed: bool) -> list[float]:
    """Run TRL's PPO; return the seconds of its iterations but the first."""
    folder = place.folder / f"trl-{number}"
    folder.mkdir()
    options = {
        "policy": inputs.policy,
        "reward": inputs.reward,
        "prompts": models.prompts(models.NUM_PROMPTS, place.seed),
        "length": models.MAX_LENGTH if skewed or place.gpu else 64,
        "stops": skewed,
        "iterations": runs.ITERATIONS,
        "rank": models.LORA_RANK,
        "bf16": place.gpu,
        "out": str(folder),
    }
    environment = {key: each for key, each in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with (folder / "log.txt").open("wb") as log:
        ended = subprocess.run(
            [place.trl, "-P", str(ROOT / "scripts" / "bench" / "trl_ppo.py"), json.dumps(options)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=RUN_S,
            check=False,
        )
    if ended.returncode:
        tail = (folder / "log.txt").read_text(errors="replace").splitlines()[-LOG_LINES:]
        raise RuntimeError(f"TRL's PPO failed: {' | '.join(tail)}")
    ends = json.loads((folder / "ends.json").read_text(encoding="utf-8"))
    return [end - start for start, end in pairwise(ends)]
