"""Rows of starting: this code and another commit, in turn, each as its own checkout runs it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import models, runs
from bench.figures import Figure, InTurn
from bench.running import ROOT, Place

ALTERNATIONS = 2
PROOF_SHARDS = 2
QUICK_START = "configs/quickstart.yaml"


def first_rollout(place: Place) -> list[Figure]:
    """Return how many times as soon the first batch is asked for."""
    inputs = runs.write_inputs(place.folder / "inputs", models.SMALL, place.seed)

    def timed(code: str, name: str) -> float:
        folder = place.folder / name
        values = runs.ppo_values(inputs, folder, skewed=False, gpu=place.gpu)
        values["ppo"]["iterations"] = 1
        return runs.run(values, code, until=_has_sampled)

    place.begin(ALTERNATIONS + 1)
    for number, code in enumerate((str(ROOT), place.against)):  # fills caches
        timed(code, f"warm-{number}")
    place.step()
    pair = _alternate(place, timed)
    return [pair.speed()]


def _has_sampled(folder: Path) -> bool:
    """Return whether the generator has sampled more than the proof's two shards."""
    trace = folder / "trace.json"
    if not trace.is_file():
        return False
    text = trace.read_text(encoding="utf-8", errors="replace")
    return text.count('"name": "generate"') > PROOF_SHARDS


def quick_start(place: Place) -> list[Figure]:
    """Return how many times as soon the quick start's run ends."""
    seen: list[dict[str, Any]] = []

    def timed(code: str, name: str) -> float:
        folder = place.folder / name
        config = str(Path(code) / QUICK_START)
        seconds = runs.command(["run", config, f"run.dir={folder}"], folder, code)
        seen.append({"run": name, "seconds": seconds, **_learnt(folder)})
        return seconds

    place.begin(ALTERNATIONS)
    pair = _alternate(place, timed)
    return [pair.speed(runs=seen)]


def _alternate(place: Place, timed: Callable[[str, str], float]) -> InTurn:
    """Time both checkouts in turn; the one that begins changes."""
    seconds: tuple[list[float], list[float]] = ([], [])
    codes = (str(ROOT), place.against)
    for number in range(ALTERNATIONS):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            name = f"{('ours', 'against')[which]}-{number}"
            seconds[which].append(timed(codes[which], name))
        place.step()
    return InTurn(*seconds)


def _learnt(folder: Path) -> dict[str, Any]:
    """Return what a run of all stages has learnt, and what it warned of."""

    def summary(stage: str) -> dict[str, Any]:
        path = folder / stage / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    ppo, rate = summary("ppo"), summary("evaluate").get("win_rate") or {}
    output = folder.with_suffix(".txt").read_text(encoding="utf-8", errors="replace")
    return {
        "reward_first": ppo.get("reward_first"),
        "reward_last": ppo.get("reward_last"),
        "win_rate": rate.get("value"),
        "warnings": [line for line in output.splitlines() if "warn" in line.lower()][:20],
    }
