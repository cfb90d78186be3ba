"""Rows of a run's files: the report of a long run, and `prepare` of a large dump."""

import asyncio
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from bench.figures import Figure, of_rounds
from bench.idle_roles import IdleRun
from bench.running import Place
from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config import resolve
from rlhf_ray.data.stack_exchange import synthetic_site
from rlhf_ray.observability.tracing import Tracer
from rlhf_ray.report.report import build
from rlhf_ray.stages import prepare as prepare_stage

ITERATIONS = 10_000
PATTERN = 40
"""Iterations of the run whose records are repeated."""
EVAL_EVERY = 10
REPORTS = 3
SHARDS = 4
SPANS = (
    *(("driver", name, 1) for name in ("gen", "score", "learn", "commit", "sync")),
    ("disk", "save", 1),
    ("generator-0", "generate", SHARDS),
    ("reference-0", "logprobs", SHARDS),
    ("reward-0", "score", SHARDS),
    ("policy-0", "logprobs", SHARDS),
    ("critic-0", "values", SHARDS),
    *(
        (row, name, 1)
        for row in ("policy-0", "critic-0")
        for name in ("assemble", "learn", "state")
    ),
    ("policy-0", "adapter", 1),
    ("generator-0", "publish", 1),
)
"""Row, name and number of the spans of an iteration, as a run with one process a role has them."""
ITERATION_S = 30.0
NUM_QUESTIONS = 80_000
PREPARED = 2
"""Rounds of preparing a dump."""
MB = 1e6


def report(place: Place) -> list[Figure]:
    """Return seconds and size of the report of a long run."""
    place.begin(REPORTS + 2)
    pattern = IdleRun(place.folder / "pattern", PATTERN, 64, 1, eval_every=EVAL_EVERY)
    summary = asyncio.run(pattern.run())
    place.step()
    folder = place.folder / "run"
    _repeat(pattern.folder / "ppo", folder / "ppo")
    _write_spans(folder / "trace.json")
    config = yaml.safe_dump(pattern.config().model_dump(mode="json"))
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    text = json.dumps(summary | {"iterations": ITERATIONS}, default=str)
    (folder / "ppo" / "summary.json").write_text(text, encoding="utf-8")
    place.step()
    seconds = list[float]()
    for _ in range(REPORTS):
        began_s = time.perf_counter()
        page = build(folder)
        seconds.append(time.perf_counter() - began_s)
        place.step()
    read = {path.name: path.stat().st_size / MB for path in _files(folder)}
    return [of_rounds(seconds, read_mb=read), Figure(page.stat().st_size / MB)]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.json*") if path.is_file())


def _repeat(source: Path, target: Path) -> None:
    """Repeat the records of each file up to `ITERATIONS`."""
    target.mkdir(parents=True)
    for path in source.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        with (target / path.name).open("w", encoding="utf-8") as file:
            for first in range(0, ITERATIONS, PATTERN):
                for record in records:
                    # The evaluation before the first iteration is not repeated.
                    if record.get("iteration", 1) or not first:
                        again = record | {"iteration": record.get("iteration", 1) + first}
                        file.write(json.dumps(again) + "\n")


def _write_spans(path: Path) -> None:
    tracer = Tracer(path)
    for iteration in range(1, ITERATIONS + 1):
        began_s = 1.8e9 + ITERATION_S * iteration
        for row, name, count in SPANS:
            each_s = ITERATION_S / 10 / count
            for index in range(count):
                start_s = began_s + index * each_s
                tracer.add(row, name, start_s, start_s + each_s / 2, iteration=iteration)
            if row == "driver":
                began_s += ITERATION_S / 10
    tracer.close()


def prepare(place: Place) -> list[Figure]:
    """Return what a second process adds to `prepare` on a large dump, its speed and its memory."""
    place.begin(1 + 2 * PREPARED)
    posts = place.folder / "Posts.xml"
    synthetic_site.write_posts(posts, NUM_QUESTIONS, seed=place.seed)
    place.step()
    values = {"run": {"dir": str(place.folder / "run")}, "cluster": {"mode": "local"}}
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with ray_session(resolve(values)):
        for _ in range(PREPARED):
            for num_workers, taken in seconds.items():
                asked = {"posts": str(posts), "num_workers": num_workers}
                began_s = time.perf_counter()
                summary = prepare_stage.run(resolve({**values, "prepare": asked}))
                taken.append(time.perf_counter() - began_s)
                place.step()
    num_posts = summary["questions"] + summary["answers"]
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    details = {
        "questions": summary["questions"],
        "posts": num_posts,
        "dump_mb": posts.stat().st_size / MB,
        "seconds": seconds,
    }
    ratios = [one / two for one, two in zip(*seconds.values(), strict=True)]
    return [
        of_rounds(ratios),
        Figure(num_posts / min(seconds[2]), details=details),
        Figure(peak_mb),
    ]
