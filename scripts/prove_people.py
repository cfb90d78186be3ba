#!/usr/bin/env python
"""Shows that a policy follows a person's taste: configs/human_feedback.yaml with a scripted one.

Usage: python scripts/prove_people.py [--out FOLDER] [--seeds 0 1 2]

The person prefers the more courteous of two answers, and takes two alike for a tie. For each seed a
second run goes on from the same SFT model without the stage rank. Prints the share of courteous
answers to the held-out prompts; exits with 1 where it is not higher with the person.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from rlhf_ray.data.stack_exchange.synthetic_site import courtesy
from rlhf_ray.people.preferences import Verdict
from rlhf_ray.people.ranking import Ranking, Shown

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "human_feedback.yaml"
WITHOUT_PEOPLE = "run.stages=[prepare,pretrain,sft,reward,ppo,evaluate,report]"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "prove_people")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    print("seed   verdicts    sft  alone  people   win rates: alone, people")
    holds = True
    for seed in arguments.seeds:
        with_people, alone = (arguments.out / f"seed{seed}" / name for name in ("people", "alone"))
        _run(with_people, seed, "rank.wait=false")
        if not alone.exists():
            shutil.copytree(with_people, alone, symlinks=True)
        num_verdicts = rank_all(with_people)
        _run(with_people, seed, "rank.wait=false")
        _run(alone, seed, WITHOUT_PEOPLE)
        sft, share = _courteous(with_people, "sft"), _courteous(with_people, "ppo")
        share_alone = _courteous(alone, "ppo")
        rates = ", ".join(f"{_win_rate(run):.2f}" for run in (alone, with_people))
        print(f"{seed:<6}{num_verdicts:>9}{sft:>7.2f}{share_alone:>7.2f}{share:>8.2f}   {rates}")
        holds = holds and share > share_alone
    return 0 if holds else 1


def rank_all(run: Path, person: str = "ann") -> int:
    """Rank all pairs that a person has not seen; return their verdicts."""
    people = Ranking(run)
    while shown := people.next(person):
        people.answer(person, shown.pair.id, verdict_on(shown))
    return people.progress(person).num_answers


def verdict_on(shown: Shown) -> Verdict:
    """Return the scripted person's verdict on a pair."""
    left, right = (courtesy(side.text) for side in shown.sides)
    return "tie" if left == right else "left" if left > right else "right"


def _run(folder: Path, seed: int, *overrides: str) -> None:
    command = ["rlhf-ray", "run", str(CONFIG), f"run.dir={folder}", f"run.seed={seed}", *overrides]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)


def _courteous(run: Path, model: str) -> float:
    lines = (run / "evaluate" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(courtesy(json.loads(line)[model]["text"]) > 0 for line in lines) / len(lines)


def _win_rate(run: Path) -> float:
    return json.loads((run / "evaluate" / "summary.json").read_text())["win_rate"]["value"]


if __name__ == "__main__":
    sys.exit(main())
