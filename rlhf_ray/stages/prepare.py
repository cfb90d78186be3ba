"""Stage prepare: split Stack Exchange dumps into four sets that share no question.

The dumps are cut into parts, whose posts are grouped into buckets by question; then each bucket
becomes a file of each set. With more than one part Ray Data spreads both over the nodes. What is
done stays done: a run that was killed goes on at the next part or bucket.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import datasets

from rlhf_ray.config import Config
from rlhf_ray.data.prepare.question_sets import SETS
from rlhf_ray.data.prepare.shards import SetCounts, Shards
from rlhf_ray.data.stack_exchange import synthetic_site as synthetic
from rlhf_ray.data.stack_exchange.archives import is_url, site_name, stamp
from rlhf_ray.data.stack_exchange.grouping import Counts, require_questions
from rlhf_ray.data.stack_exchange.parts import find_dumps, num_buckets
from rlhf_ray.data.text_statistics import histogram
from rlhf_ray.disk import unwritable_is_an_error, write_atomically
from rlhf_ray.errors import DataError
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.scratch import shared_scratch
from rlhf_ray.stages.shards_on_ray import convert_on_ray, group_on_ray, uses_ray

MEGABYTE = 2**20
MARKER = "digest"
"""File with the digest of what is being prepared."""
FORMAT = 2
"""Version of the files that a killed run leaves: another one begins again."""


def run(config: Config) -> dict[str, object]:
    """Read the dumps of ``prepare.posts`` (or write a synthetic one) and write the four sets.

    They replace the sets of an earlier run of this stage, and only once all of them are complete.

    Returns:
        What ``prepare/summary.json`` holds; ``prepare/quality.json`` describes the texts.

    Raises:
        DataError: a dump cannot be used, has too many bad posts, or is too small for four sets.
        ConfigError: the run folder cannot be written, or a package to read a dump is missing.
    """
    start = time.monotonic()
    folder = RunFolder(config)
    progress = Progress(config.run.stages)
    with (
        unwritable_is_an_error(folder.stage("prepare")),
        progress.stage("prepare", unit="question") as bar,
        _resumable(config, folder) as shards,
        uses_ray(shards) as on_ray,
    ):
        parts = _group(shards, bar, on_ray)
        _convert(shards, parts, bar, on_ray)
        summary = _finish(shards, parts.values())
        _move(shards.sets, folder.stage("prepare"))
        summary |= {
            "synthetic": not config.prepare.dumps,
            "seconds": round(time.monotonic() - start, 3),
        }
        folder.write_summary("prepare", summary)
    return summary


@contextmanager
def _resumable(config: Config, folder: RunFolder) -> Iterator[Shards]:
    """Give the shards of this run of the stage, with what an interrupted one has done of them.

    Their files stay when the block is interrupted, and go when it is done or the data is bad.
    """
    stage, rows = folder.stage("prepare"), shared_scratch(config) / "posts"
    # Absolute: Ray's processes may have other working folders.
    given = [path if is_url(path) else os.path.abspath(path) for path in config.prepare.dumps]
    sets, paths = stage / ".partial", given or [str(stage / "Posts.xml")]
    digest, marker = _digest(config), sets / MARKER
    if not (rows.is_dir() and marker.is_file() and marker.read_text(encoding="utf-8") == digest):
        for made in (sets, rows):
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
        for name in SETS:
            (sets / name).mkdir()
        if not config.prepare.dumps:
            synthetic.write_posts(paths[0], config.prepare.num_questions, config.run.seed)
        write_atomically(marker, digest)
    try:
        dumps = find_dumps(paths)
        sites = tuple(config.prepare.site or site_name(path) for path in paths)
        yield Shards(config, tuple(dumps), sites, num_buckets(dumps), rows, sets)
    except DataError:
        _remove(sets, rows)
        raise
    _remove(sets, rows)


def _remove(sets: Path, rows: Path) -> None:
    for folder in (sets, rows):
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # the run's folder in the scratch may hold other files
        rows.parent.rmdir()


def _digest(config: Config) -> str:
    """Return a name for all that decides what the sets hold, and in which files it is."""
    fixed = config.prepare.model_dump(exclude={"posts_gb", "scratch", "num_workers"})
    given = (FORMAT, fixed, config.run.seed, [stamp(path) for path in config.prepare.dumps])
    return hashlib.blake2b(json.dumps(given).encode(), digest_size=16).hexdigest()


def _group(shards: Shards, bar: Bar, on_ray: bool) -> dict[str, Counts]:
    """Group the posts of all parts; returns the parts' names, in order, with their counts."""
    total = sum(dump.num_bytes for dump in shards.dumps)
    bar.restart(max(1, total // MEGABYTE), "megabyte")
    parts, num_bytes = {}, 0
    for name in (group_on_ray if on_ray else _grouped)(shards):
        parts[name] = shards.grouped(name)
        num_bytes += parts[name].num_bytes
        bar.advance(num_bytes // MEGABYTE - bar.done)
    parts = dict(sorted(parts.items()))
    require_questions([dump.path for dump in shards.dumps], [*parts.values()])
    return parts


def _grouped(shards: Shards) -> Iterator[str]:
    for dump in shards.dumps:
        for part, xml in dump.pieces():
            yield part.name if shards.is_grouped(part) else shards.group(part, xml)


def _convert(shards: Shards, parts: Mapping[str, Counts], bar: Bar, on_ray: bool) -> None:
    """Turn each bucket into a file of each set, and show the posts a second."""
    num_questions = sum(counts.num_selected for counts in parts.values())
    bar.restart(min(num_questions, shards.config.prepare.limit or num_questions), "question")
    done = {bucket for bucket in range(shards.num_buckets) if shards.is_converted(bucket)}
    bar.advance(sum(shards.counted(bucket)["questions"] for bucket in done))
    start_s, num_posts = time.monotonic(), 0

    def count(posts: Mapping[str, int]) -> None:
        nonlocal num_posts
        num_posts += posts["questions"] + posts["answers"]
        rate = num_posts / max(time.monotonic() - start_s, 1e-3)
        bar.advance(posts["questions"], **{"posts/s": rate})

    buckets = [bucket for bucket in range(shards.num_buckets) if bucket not in done]
    convert = partial(shards.convert, names=[*parts], last_rank=shards.last_rank(parts))
    if on_ray:
        for bucket in convert_on_ray(shards, convert, buckets):
            count(shards.counted(bucket))
    else:
        for bucket in buckets:
            convert(bucket, on_question=count)


def _finish(shards: Shards, parts: Iterable[Counts]) -> dict[str, object]:
    """Check the counts, write quality.json and what makes folders of the sets' files.

    Returns:
        The summary's counts.
    """
    with SetCounts(shards.config, shards.name) as counts:
        for bucket in range(shards.num_buckets):
            counts.add_saved(shards.converted(bucket))
        texts = {name: stats.report() for name, stats in counts.texts.items()}
    for part in parts:
        counts.skipped.update(part.skipped)
    for reason, num in counts.skipped.items():
        counts.tally.drop_bad(reason, num)
    counts.tally.finish()
    rows = {name: counts.rows[name] for name in SETS}
    if empty := [name for name, num in rows.items() if not num]:
        raise DataError(
            f"{shards.name}: its {counts.posts['questions']} questions leave no rows for "
            f"{', '.join(empty)} (rows: {rows}); give a larger dump, or raise that share in "
            "prepare. Sets reward and evaluation need questions with answers of different scores"
        )
    for name in SETS:
        _describe(shards, name)
    scores = histogram({int(score): num for score, num in counts.scores.items()})
    pairs = {name: counts.posts[name] for name in ("pairs", "ties")}
    quality = json.dumps({**texts, "scores": scores, "pairs": pairs}, indent=2) + "\n"
    write_atomically(shards.sets / "quality.json", quality)
    return {
        "questions": counts.posts["questions"],
        "answers": counts.posts["answers"],
        "rows": rows,
        "dropped": counts.tally.dropped | dict(counts.unused),
    }


def _describe(shards: Shards, name: str) -> None:
    """Write what makes a folder for ``datasets.load_from_disk`` of a set's files."""
    folder = shards.sets / name
    if not folder.is_dir():  # moved already, by a run that was killed just then
        return
    datasets.DatasetInfo(features=SETS[name]).write_to_directory(str(folder))
    digest = (shards.sets / MARKER).read_text(encoding="utf-8")
    state = {
        "_data_files": [{"filename": file.name} for file in sorted(folder.glob("*.arrow"))],
        "_fingerprint": hashlib.blake2b(f"{digest}:{name}".encode(), digest_size=8).hexdigest(),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_atomically(folder / "state.json", json.dumps(state, indent=2) + "\n")


def _move(made: Path, final: Path) -> None:
    """Replace what an earlier run of the stage has left."""
    (final / "summary.json").unlink(missing_ok=True)
    for name in (*SETS, "quality.json"):
        target = final / name
        if (made / name).exists():
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(made / name, target)
