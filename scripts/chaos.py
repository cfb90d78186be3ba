#!/usr/bin/env python
"""Kills processes of real PPO runs, and shows what was survived and how long it took.

Usage: python scripts/chaos.py [--kills N] [--seed S] [--phases] [--roles ROLE ...] [--out FOLDER]

Runs follow each other until N kills were made, each with a few kills by SIGKILL over all roles, at
random moments, or with --phases at the edges of each phase. Every run must end with all its
iterations, an exact ledger, no process or shared memory left, and a reward within the band of three
undisturbed runs, which come first. FOLDER keeps results.jsonl: a later call of the same kind
continues there. Writes FOLDER/summary.json and prints a table; exits with 1 where a run had a
fault.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kills.choice import ROLES, Plan
from kills.inputs import prepare
from kills.runs import NODE, ChaosRun, Mode, Outcome
from kills.table import summarised, table

from rlhf_ray.observability.progress import Progress
from rlhf_ray.observability.quiet import silence_dependencies

ROOT = Path(__file__).parents[1]
CALM_RUNS = 3
SAME = 1e-6
"""Rewards that differ by less are the same."""


class Results:
    """The runs so far, in a file to which calls append."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "results.jsonl"
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        self.runs: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def append(self, run: dict[str, Any]) -> None:
        """Keep a run."""
        self.runs.append(run)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")

    def calm(self, iterations: int) -> dict[int, float]:
        """Return the rewards of undisturbed runs of that length, by seed."""
        calm = [run for run in self.runs if not run["kills"] and not run["faults"]]
        return {run["seed"]: run["reward_last"] for run in calm if run["iterations"] == iterations}

    def next_kill(self, plan: str) -> int:
        """Return the number of the kill with which a plan continues."""
        return max((run["next"] for run in self.runs if run["plan"] == plan), default=0)

    def kills(self, plan: str) -> int:
        """Return how many kills of a plan were made."""
        return sum(len(run["kills"]) for run in self.runs if run["plan"] == plan)


def main() -> int:
    arguments = _arguments()
    silence_dependencies()
    began_s, longest_s = time.monotonic(), 0.0
    arguments.out.mkdir(parents=True, exist_ok=True)
    inputs = arguments.out / "inputs"
    config = inputs / "config.yaml" if inputs.exists() else prepare(inputs)
    results = Results(arguments.out)
    plan = Plan(arguments.seed, arguments.roles, arguments.per_run, arguments.phases)
    name, done = repr(plan), results.kills(repr(plan))
    with Progress().stage("chaos", arguments.kills, "kill", done=done) as bar:
        while done < arguments.kills:
            if time.monotonic() - began_s + longest_s > 60 * arguments.minutes:
                break
            run = _next_run(arguments, plan, results, config)
            run.on_kill = lambda struck: bar.advance()
            outcome = run.run()
            longest_s = max(longest_s, outcome.seconds)
            results.append(_record(run, outcome, name, results.calm(plan.iterations)))
            done = results.kills(name)
            if not outcome.faults:
                shutil.rmtree(run.folder)
            elif not run.kills:
                sys.exit(f"An undisturbed run failed ({run.folder}): {outcome.faults}")
    summary = summarised(results.runs, arguments.kills)
    text = json.dumps(summary, indent=2)
    (arguments.out / "summary.json").write_text(text + "\n", encoding="utf-8")
    print("\n".join(table(summary)))
    return 1 if summary["faults"] else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the choice of kills")
    parser.add_argument("--roles", nargs="+", choices=ROLES, default=list(ROLES))
    parser.add_argument("--phases", action="store_true", help="kill at the edges of phases")
    parser.add_argument("--per-run", type=int, default=6, help="kills in a run")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "chaos")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin no run that would end later than this"
    )
    arguments = parser.parse_args()
    arguments.out = arguments.out.absolute()
    return arguments


def _next_run(
    arguments: argparse.Namespace, plan: Plan, results: Results, config: Path
) -> ChaosRun:
    """Return an undisturbed run as long as some are missing; then one with the next kills."""
    seeds = range(arguments.seed, arguments.seed + CALM_RUNS)
    missing = [seed for seed in seeds if seed not in results.calm(plan.iterations)]
    folder = arguments.out / f"run-{len(results.runs)}"
    shutil.rmtree(folder, ignore_errors=True)
    if missing:
        return ChaosRun(folder, config, "local", plan.iterations, missing[0])
    number = results.next_kill(repr(plan))
    kills = plan.run_of(number)
    mode: Mode = "ray" if any(kill.role == NODE for kill in kills) else "local"
    seed = seeds[number // plan.per_run % CALM_RUNS]
    return ChaosRun(folder, config, mode, plan.iterations, seed, kills)


def _record(run: ChaosRun, outcome: Outcome, plan: str, calm: dict[int, float]) -> dict[str, Any]:
    reward, faults = outcome.summary.get("reward_last"), list(outcome.faults)
    is_calm = not run.kills
    if not is_calm and reward is not None:
        low, high = min(calm.values()), max(calm.values())
        if not low - SAME <= reward <= high + SAME:
            faults.append(f"reward {reward:.4f}, outside of {low:.4f} to {high:.4f}")
    return {
        "plan": plan if run.kills else "",
        "next": run.kills[-1].number + 1 if run.kills else 0,
        "folder": str(run.folder),
        "mode": run.mode,
        "seed": run.seed,
        "iterations": run.iterations,
        "seconds": outcome.seconds,
        "reward_last": reward,
        "equal": reward is not None and abs(reward - calm.get(run.seed, reward + 1)) < SAME,
        "ratio": outcome.summary.get("effective_time_ratio"),
        "faults": faults,
        "kills": [
            asdict(struck.kill)
            | {
                "phase": struck.phase,
                "ended": sorted(struck.ended),
                "recovered_s": struck.recovered_s,
                "cold_s": struck.cold_s,
                "survived": struck.survived and not faults[len(outcome.faults) :],
            }
            for struck in outcome.struck
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
