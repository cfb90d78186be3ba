"""Stage prepare: split a Stack Exchange dump into four sets that share no question."""

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import datasets
from datasets.arrow_writer import ArrowWriter

from rlhf_ray.config import Config
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.stack_exchange import synthetic_site as synthetic
from rlhf_ray.data.stack_exchange.archives import site_name, unpacked
from rlhf_ray.data.stack_exchange.posts import Question, open_posts
from rlhf_ray.disk import unwritable_is_an_error
from rlhf_ray.errors import DataError
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.quality import TextStats, histogram
from rlhf_ray.stages.question_sets import SETS, set_of_question, to_markdown

MEGABYTE = 2**20


def run(config: Config) -> dict[str, object]:
    """Read the dump of ``prepare.posts`` (or write a synthetic one) and write the four sets.

    They replace the sets of an earlier run of this stage, and only once all of them are complete.

    Returns:
        What ``prepare/summary.json`` holds; ``prepare/quality.json`` describes the texts.

    Raises:
        DataError: the dump cannot be used, has too many bad posts, or is too small for four sets.
        ConfigError: the run folder cannot be written, or a .7z cannot be unpacked without py7zr.
    """
    start = time.monotonic()
    folder = RunFolder(config)
    progress = Progress(config.run.stages)
    with (
        unwritable_is_an_error(folder.stage("prepare")),
        _all_or_nothing(folder) as partial,
        progress.stage("prepare", unit="question") as bar,
    ):
        posts = Path(config.prepare.posts or partial / "Posts.xml")
        if config.prepare.posts is None:
            synthetic.write_posts(posts, config.prepare.num_questions, config.run.seed)
        with unpacked(posts, partial) as file, _Sets(config, posts, partial) as sets:
            _fill(sets, file, bar)
        summary = sets.finish()
    summary |= {
        "synthetic": config.prepare.posts is None,
        "seconds": round(time.monotonic() - start, 3),
    }
    folder.write_summary("prepare", summary)
    return summary


@contextmanager
def _all_or_nothing(folder: RunFolder) -> Iterator[Path]:
    """Make a folder to write in; its files move into the stage's folder when the block is done."""
    final = folder.stage("prepare")
    partial = final / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        (final / "summary.json").unlink(missing_ok=True)
        for item in partial.iterdir():
            target = final / item.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(item, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(sets: "_Sets", file: Path, bar: Bar) -> None:
    """Pass over the posts, then over the questions; memory does not grow with the dump."""
    num_megabytes = max(1, file.stat().st_size // MEGABYTE) if file.is_file() else None
    bar.restart(num_megabytes, "megabyte")
    with open_posts(
        file,
        sets.folder,
        sets.skipped,
        on_read=lambda num_bytes: bar.advance(num_bytes // MEGABYTE - bar.done),
    ) as posts:
        bar.restart(posts.num_questions, "question")
        for question in posts.questions():
            sets.add(question)
            bar.advance()


class _Sets:
    """The four sets while they are written, with counts of what was read."""

    def __init__(self, config: Config, posts: Path, folder: Path) -> None:
        self.folder = folder
        self.skipped: Counter[str] = Counter()
        self._config = config
        self._posts = posts
        self._site = config.prepare.site or site_name(posts)
        self._tally = RowTally(str(posts), config.data.max_bad_share)
        self._unused: Counter[str] = Counter()
        self._num_rows = dict.fromkeys(SETS, 0)
        self._num_questions = self._num_answers = 0
        self._quality: dict[str, object] = {}
        self._scores: Counter[int] = Counter()
        self._num_pairs = self._num_ties = 0

    def __enter__(self) -> "_Sets":
        with ExitStack() as stack:
            texts = ("questions", "answers")
            self._texts = {name: stack.enter_context(TextStats()) for name in texts}
            tables = {name: str(self.folder / f"{name}.arrow") for name in SETS}
            self._writers = {
                name: stack.enter_context(ArrowWriter(features=features, path=tables[name]))
                for name, features in SETS.items()
            }
            self._files = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._files:
            if kind is None:
                for writer in self._writers.values():
                    writer.finalize()
                self._quality = {name: texts.report() for name, texts in self._texts.items()}

    def add(self, question: Question) -> None:
        """Convert a question and write its rows into the set that it belongs to."""
        self._num_questions += 1
        self._num_answers += len(question.answers)
        ready = to_markdown(question, self._config, self._site, self._tally, self._unused)
        if ready is None:
            return
        self._texts["questions"].add(ready.text)
        for answer in ready.question.answers:
            self._texts["answers"].add(ready.answers[answer.id])
            self._scores[answer.score] += 1
        self._count_ties(Counter(answer.score for answer in ready.question.answers))
        name = set_of_question(question.id, self._config)
        rows = ready.rows(name)
        if not rows:
            self._unused["question_without_pairs"] += 1
        for row in rows:
            self._writers[name].write(dict(row))
        self._num_rows[name] += len(rows)

    def _count_ties(self, scores: Counter[int]) -> None:
        """Count the pairs of answers to one question, and those with equal scores."""
        self._num_pairs += math.comb(scores.total(), 2)
        self._num_ties += sum(math.comb(num, 2) for num in scores.values())

    def finish(self) -> dict[str, object]:
        """Check the counts, save the sets and quality.json; returns the summary's counts."""
        for reason, num in self.skipped.items():
            self._tally.drop_bad(reason, num)
        self._tally.finish()
        if empty := [name for name, num in self._num_rows.items() if not num]:
            raise DataError(
                f"{self._posts}: its {self._num_questions} questions leave no rows for "
                f"{', '.join(empty)} (rows: {self._num_rows}); give a larger dump, or raise that "
                "share in prepare. Sets reward and evaluation need questions with answers of "
                "different scores"
            )
        _save(self.folder)
        ties = {"pairs": self._num_pairs, "ties": self._num_ties}
        quality = {**self._quality, "scores": histogram(self._scores), "pairs": ties}
        text = json.dumps(quality, indent=2) + "\n"
        (self.folder / "quality.json").write_text(text, encoding="utf-8")
        return {
            "questions": self._num_questions,
            "answers": self._num_answers,
            "rows": self._num_rows,
            "dropped": self._tally.dropped | dict(self._unused),
        }


def _save(partial: Path) -> None:
    """Turn each set's Arrow file into a folder for ``datasets.load_from_disk``."""
    datasets.disable_progress_bars()
    for name in SETS:
        table = partial / f"{name}.arrow"
        datasets.Dataset.from_file(str(table)).save_to_disk(str(partial / name))
        table.unlink()
