#!/usr/bin/env python
"""Shows that the recipe learns, that a KL penalty of zero is hacked, and that faults are caught.

Usage: python scripts/prove_recipe.py [--out FOLDER] [--seeds 0 1 2] [--docs]

For each seed the stages up to the reward model run once; from there PPO runs under every setting of
`EXPERIMENTS`, two runs at a time, one thread each. What an earlier call finished is not done again.
Writes FOLDER/summary.json (a row an experiment and seed), FOLDER/claims.md and FOLDER/curves.svg;
with --docs also the part of docs/recipe.md that shows them. Exits with 1 where a claim fails.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rlhf_ray.observability.progress import Progress
from rlhf_ray.observability.quiet import silence_dependencies

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CURVES = """![Reward and KL of the runs](recipe_curves.svg)

Lines are means over seeds; bands reach from the lowest seed to the highest.
"""


def main() -> int:
    # Here, because children import this file before anything silences them.
    from proof.claims import claims_of, draw, row_of, same_curves, write
    from proof.runs import EXPERIMENTS, jobs_of, prepare, train

    arguments = _arguments()
    out, seeds = arguments.out.absolute(), arguments.seeds
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    jobs = jobs_of(out, seeds)
    alone = [job for job in jobs if job.name == "ray"]
    with Progress().stage("prove", len(seeds) + len(jobs), "run") as bar:
        for work, workers, several in (
            (prepare, 2, [(out / f"seed{seed}", seed) for seed in seeds]),
            (train, 2, [(job,) for job in jobs if job not in alone]),
            (train, 1, [(job,) for job in alone]),
        ):
            for _ in _in_processes(work, workers, several):
                bar.advance()
    rows = [row_of(job) for job in jobs if job.name in EXPERIMENTS]
    claims = [*claims_of(rows), *same_curves(jobs)]
    write(out, rows, claims)
    draw(jobs, out / "curves.svg")
    if arguments.docs:
        _update_docs(out)
    print((out / "claims.md").read_text(encoding="utf-8"))
    return 0 if all(claim.holds for claim in claims) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "prove_recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--docs", action="store_true", help="write the proof into docs/recipe.md")
    return parser.parse_args()


def _in_processes(
    work: Callable[..., None], workers: int, several: Sequence[tuple[Any, ...]]
) -> Iterator[None]:
    """Run each job in a process of its own: faults and threads belong to a process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, silence_dependencies, max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(work, *arguments) for arguments in several]):
            yield future.result()


def _update_docs(out: Path) -> None:
    """Put the tables between the marks in docs/recipe.md, and the curves beside it."""
    shutil.copy(out / "curves.svg", DOCS / "recipe_curves.svg")
    page = DOCS / "recipe.md"
    head, mark, rest = page.read_text(encoding="utf-8").partition("<!-- proof -->\n")
    _, end, tail = rest.partition("<!-- end of proof -->\n")
    claims = (out / "claims.md").read_text(encoding="utf-8")
    page.write_text(f"{head}{mark}\n{claims}\n{CURVES}\n{end}{tail}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
