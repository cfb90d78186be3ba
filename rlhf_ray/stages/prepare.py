"""Stage prepare: a Stack Exchange dump becomes four sets that share no question."""

import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

from rlhf_ray.config import Config
from rlhf_ray.data import template
from rlhf_ray.data.quality import TextStats, histogram
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.stack_exchange import posts as stack_exchange
from rlhf_ray.data.stack_exchange import synthetic_site as synthetic
from rlhf_ray.data.stack_exchange.archives import site_name, unpacked
from rlhf_ray.data.stack_exchange.posts import Answer, Question
from rlhf_ray.errors import DataError
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.runs.folder import RunFolder, unwritable_is_an_error

MEGABYTE = 2**20

_QUESTION = {
    "question_id": datasets.Value("int64"),
    "question": datasets.Value("string"),
    "prompt": datasets.Value("string"),
    "link": datasets.Value("string"),
}
_PAIR = {"chosen": datasets.Value("string"), "rejected": datasets.Value("string")}
_ANSWER = {
    "completion": datasets.Value("string"),
    "score": datasets.Value("int64"),
    "preferred": datasets.Value("bool"),
}
SETS = {
    "finetune": datasets.Features(_QUESTION | _ANSWER),
    "reward": datasets.Features(_QUESTION | _PAIR),
    "rl": datasets.Features(_QUESTION),
    "evaluation": datasets.Features(_QUESTION | _PAIR),
}
"""Columns of each set: one row an answer, a pair, a question, a pair. ``link`` is the question's
address, which the dumps' licence asks to keep; users are never named."""


def run(config: Config) -> dict[str, Any]:
    """Read the dump of ``prepare.posts`` (or write a synthetic one) and write the four sets.

    They replace those of an earlier run of this stage, and only once all of them are whole.

    Returns:
        What ``prepare/summary.json`` holds; ``prepare/quality.json`` says what the texts are like.

    Raises:
        DataError: the dump cannot be used, has too many bad posts, or is too small for four sets.
        ConfigError: the run folder cannot be written, or a .7z cannot be unpacked without py7zr.
    """
    start = time.monotonic()
    folder = RunFolder(config)
    progress = Progress(config.run.stages)
    with (
        unwritable_is_an_error(folder.stage("prepare")),
        _whole_or_not_at_all(folder) as partial,
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
def _whole_or_not_at_all(folder: RunFolder) -> Iterator[Path]:
    """A folder to write in, whose files move into the stage's folder when the block is done."""
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
    """One pass over the posts and one over the questions; memory does not grow with the dump."""
    num_megabytes = max(1, file.stat().st_size // MEGABYTE) if file.is_file() else None
    bar.restart(num_megabytes, "megabyte")
    with stack_exchange.open_posts(
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
    """The four sets as they are written, and what was counted on the way.

    Args:
        config: shares of the sets, most pairs, share of bad posts.
        posts: the dump, for messages and for the site's name.
        folder: where the sets go.
    """

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
        self._quality: dict[str, Any] = {}
        self._scores: Counter[int] = Counter()
        self._num_pairs = self._num_ties = 0

    def __enter__(self) -> "_Sets":
        with ExitStack() as stack:
            self._texts = {
                name: stack.enter_context(TextStats()) for name in ("questions", "answers")
            }
            self._writers = {
                name: stack.enter_context(
                    ArrowWriter(features=features, path=_table(self.folder, name))
                )
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
        ready = _convert(self._config, question, self._site, self._tally, self._unused)
        if ready is None:
            return
        self._texts["questions"].add(ready.text)
        for answer in ready.question.answers:
            self._texts["answers"].add(ready.answers[answer.id])
            self._scores[answer.score] += 1
        self._count_ties(Counter(answer.score for answer in ready.question.answers))
        name = _assign(self._config, question.id)
        rows = _ROWS[name](ready)
        if not rows:
            self._unused["question_without_pairs"] += 1
        for row in rows:
            self._writers[name].write(row)
        self._num_rows[name] += len(rows)

    def _count_ties(self, scores: Counter[int]) -> None:
        """Pairs of answers to one question: how many there are, and how many decide nothing."""
        self._num_pairs += math.comb(scores.total(), 2)
        self._num_ties += sum(math.comb(num, 2) for num in scores.values())

    def finish(self) -> dict[str, Any]:
        """Check the counts, save the sets and quality.json; returns the summary's part on rows.

        Raises:
            DataError: too many bad posts, or a set without rows.
        """
        for reason, num in self.skipped.items():
            self._tally.drop_bad(reason, num)
        self._tally.finish()
        _require_rows(self._posts, self._num_questions, self._num_rows)
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


@dataclass(frozen=True)
class _Converted:
    """A question with answers, in Markdown."""

    question: Question
    text: str
    answers: dict[int, str]
    pairs: list[tuple[Answer, Answer]]
    link: str | None

    @property
    def columns(self) -> dict[str, Any]:
        prompt = template.prompt(self.text)
        return {
            "question_id": self.question.id,
            "question": self.text,
            "prompt": prompt,
            "link": self.link,
        }


def _convert(
    config: Config, question: Question, site: str | None, tally: RowTally, unused: Counter[str]
) -> _Converted | None:
    """Markdown of a question and of its answers that have any text; None where nothing is left."""
    text = question.text
    if not text:
        tally.drop_bad("empty_question", 1 + len(question.answers))
        return None
    tally.keep()
    answers = {
        answer.id: stack_exchange.html_to_markdown(answer.body_html) for answer in question.answers
    }
    kept = tuple(answer for answer in question.answers if answers[answer.id])
    tally.keep(len(kept))
    tally.drop_bad("empty_answer", len(question.answers) - len(kept))
    if not kept:
        unused["question_without_answers"] += 1
        return None
    prepare = config.prepare
    pairs = stack_exchange.sample_pairs(
        replace(question, answers=kept), prepare.max_pairs, config.run.seed
    )
    distinct = [pair for pair in pairs if answers[pair[0].id] != answers[pair[1].id]]
    if len(distinct) < len(pairs):
        unused["pair_of_equal_texts"] += len(pairs) - len(distinct)
    link = f"https://{site}/questions/{question.id}" if site else None
    return _Converted(replace(question, answers=kept), text, answers, distinct, link)


def _assign(config: Config, question_id: int) -> str:
    """The set of a question: its id and the seed alone decide, on every machine."""
    digest = hashlib.sha256(f"split:{config.run.seed}:{question_id}".encode()).digest()
    point = int.from_bytes(digest[:8], "big") / 2**64
    bounds = accumulate(getattr(config.prepare, name) for name in SETS)
    # The shares may add up to a hair less than 1.
    return next((name for name, bound in zip(SETS, bounds, strict=True) if point < bound), "rl")


def _answer_rows(ready: _Converted) -> list[dict[str, Any]]:
    winners = {chosen.id for chosen, _ in ready.pairs}
    return [
        ready.columns
        | {
            "completion": ready.answers[answer.id],
            "score": answer.score,
            "preferred": answer.id in winners,
        }
        for answer in ready.question.answers
    ]


def _pair_rows(ready: _Converted) -> list[dict[str, Any]]:
    return [
        ready.columns | {"chosen": ready.answers[chosen.id], "rejected": ready.answers[rejected.id]}
        for chosen, rejected in ready.pairs
    ]


def _question_rows(ready: _Converted) -> list[dict[str, Any]]:
    return [ready.columns]


_ROWS = {
    "finetune": _answer_rows,
    "reward": _pair_rows,
    "rl": _question_rows,
    "evaluation": _pair_rows,
}


def _require_rows(posts: Path, num_questions: int, num_rows: dict[str, int]) -> None:
    empty = [name for name, num in num_rows.items() if not num]
    if empty:
        raise DataError(
            f"{posts}: its {num_questions} questions leave no rows for {', '.join(empty)} (rows: "
            f"{num_rows}); give a larger dump, or raise that share in prepare. Sets reward and "
            "evaluation need questions with answers of different scores"
        )


def _table(partial: Path, name: str) -> str:
    return str(partial / f"{name}.arrow")


def _save(partial: Path) -> None:
    datasets.disable_progress_bars()
    for name in SETS:
        datasets.Dataset.from_file(_table(partial, name)).save_to_disk(str(partial / name))
        os.unlink(_table(partial, name))
