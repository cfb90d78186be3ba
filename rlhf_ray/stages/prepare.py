"""Stage prepare: a Stack Exchange dump becomes four sets that share no question."""

import hashlib
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
from rlhf_ray.data import stack_exchange, synthetic, template
from rlhf_ray.data.row_tally import RowTally
from rlhf_ray.data.stack_exchange import Answer, Question
from rlhf_ray.errors import DataError
from rlhf_ray.stages.run_folder import RunFolder, unwritable_is_an_error

_QUESTION = {
    "question_id": datasets.Value("int64"),
    "question": datasets.Value("string"),
    "prompt": datasets.Value("string"),
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
"""Columns of each set: one row an answer, a pair, a question, a pair."""


def run(config: Config) -> dict[str, Any]:
    """Read the dump of ``prepare.posts`` (or write a synthetic one) and write the four sets.

    They replace those of an earlier run of this stage, and only once all of them are whole.

    Returns:
        What ``prepare/summary.json`` holds.

    Raises:
        DataError: the dump cannot be used, has too many bad posts, or is too small for four sets.
        ConfigError: the run folder cannot be written.
    """
    start = time.monotonic()
    folder = RunFolder(config)
    with unwritable_is_an_error(folder.stage("prepare")), _whole_or_not_at_all(folder) as partial:
        posts = config.prepare.posts
        if posts is None:
            posts = partial / "Posts.xml"
            synthetic.write_posts(posts, config.prepare.num_questions, config.run.seed)
        summary = _write_sets(config, Path(posts), partial)
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


def _write_sets(config: Config, posts: Path, partial: Path) -> dict[str, Any]:
    """Fill the four sets in one pass over the questions; memory does not grow with the dump."""
    tally = RowTally(str(posts), config.data.max_bad_share)
    skipped: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    num_rows = dict.fromkeys(SETS, 0)
    num_questions = num_answers = 0
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ArrowWriter(features=SETS[name], path=_table(partial, name)))
            for name in SETS
        }
        for question in stack_exchange.read_posts(posts, partial, skipped):
            num_questions += 1
            num_answers += len(question.answers)
            ready = _convert(config, question, tally, unused)
            if ready is None:
                continue
            name = _assign(config, question.id)
            rows = _ROWS[name](ready)
            if not rows:
                unused["question_without_pairs"] += 1
            for row in rows:
                writers[name].write(row)
            num_rows[name] += len(rows)
        for writer in writers.values():
            writer.finalize()
    for reason, num in skipped.items():
        tally.drop_bad(reason, num)
    tally.finish()
    _require_rows(posts, num_questions, num_rows)
    _save(partial)
    return {
        "questions": num_questions,
        "answers": num_answers,
        "rows": num_rows,
        "dropped": tally.dropped | dict(unused),
    }


@dataclass(frozen=True)
class _Converted:
    """A question with answers, in Markdown."""

    question: Question
    text: str
    answers: dict[int, str]
    pairs: list[tuple[Answer, Answer]]

    @property
    def columns(self) -> dict[str, Any]:
        prompt = template.prompt(self.text)
        return {"question_id": self.question.id, "question": self.text, "prompt": prompt}


def _convert(
    config: Config, question: Question, tally: RowTally, unused: Counter[str]
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
    return _Converted(replace(question, answers=kept), text, answers, distinct)


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
