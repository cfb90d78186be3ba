"""Measure how fast prepare reads a dump, and with how much memory.

    scripts/bench_data.py [QUESTIONS]          (default 200000)

Writes a synthetic dump of that many questions into a temporary folder, runs the stage prepare on it
in a process of its own, and prints one JSON line: questions, posts, seconds, posts and questions a
second, and the process's peak resident memory in MB. Exits with 1 above LIMIT_MB.
"""

import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT_MB = 1000


def main() -> int:
    num_questions = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        posts = Path(folder) / "Posts.xml"
        with context.Pool(1) as pool:
            pool.apply(_write, (posts, num_questions))
        with context.Pool(1) as pool:
            result = pool.apply(_prepare, (posts, Path(folder) / "run"))
        result["dump_mb"] = round(posts.stat().st_size / 2**20)
    print(json.dumps(result))
    return int(result["peak_mb"] > LIMIT_MB)


def _write(posts: Path, num_questions: int) -> None:
    from rlhf_ray.data.stack_exchange import synthetic_site as synthetic

    synthetic.write_posts(posts, num_questions, seed=0)


def _prepare(posts: Path, run_dir: Path) -> dict[str, Any]:
    from rlhf_ray.config import resolve
    from rlhf_ray.stages import prepare

    config = resolve({"run": {"dir": str(run_dir)}, "prepare": {"posts": str(posts)}})
    start_s = time.monotonic()
    summary = prepare.run(config)
    seconds = time.monotonic() - start_s
    num_posts = summary["questions"] + summary["answers"]
    return {
        "questions": summary["questions"],
        "posts": num_posts,
        "seconds": round(seconds, 1),
        "posts_per_s": round(num_posts / seconds),
        "questions_per_s": round(summary["questions"] / seconds),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


if __name__ == "__main__":
    sys.exit(main())
