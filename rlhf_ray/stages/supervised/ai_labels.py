"""AI-labelled pairs for a reward model or DPO: a judge prefers one of two answers.

Verdicts are written as they come to ``verdicts-<digest of the settings>.jsonl`` in the stage's
folder: a resumed stage asks for the missing ones alone, and other settings ask for all again.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

from rlhf_ray import interruption
from rlhf_ray.config import Config
from rlhf_ray.config.identity import fixed_keys
from rlhf_ray.config.rewards import PairJudgeConfig
from rlhf_ray.data.reading.counts import BadRow, SkippedRows
from rlhf_ray.data.reading.rows import (
    Row,
    StoredRows,
    require_text,
    row_prompt,
    store_rows,
    unpack_row,
)
from rlhf_ray.observability.progress import Progress
from rlhf_ray.observability.sinks import JsonlSink, read_jsonl
from rlhf_ray.rewards.judge import Pair, PairJudge, columns_in
from rlhf_ray.rewards.required_columns import require_columns
from rlhf_ray.runs.datasets import user_rows
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.types import Prompt

CHUNK = 64
"""Pairs judged at once, between two writes of verdicts."""

_GIVEN = ("prompt", "messages", "tools", "question")
"""Columns of a labelled row besides its answers."""

SKIPPED: Mapping[str, SkippedRows] = {
    "unread": SkippedRows("no_verdict", True, "the judge named neither answer"),
    "order": SkippedRows("verdict_follows_order", False),
}
"""Verdict that prefers neither -> the record of the skipped row."""


def ai_labelled_rows(config: Config, stage: str, judge: PairJudgeConfig) -> StoredRows:
    """Return the rows of ``data.preferences`` with the judge's ``chosen`` and ``rejected``.

    Raises:
        RlhfError: the judge stayed unavailable; the verdicts so far are kept.
        DataError: the data set cannot be read.
    """
    rows = user_rows(config, "preferences", "prompts")
    digest = _digest(config, judge)
    path = RunFolder(config).stage(stage) / f"verdicts-{digest}.jsonl"
    pairs = partial(_pairs, rows, f"{stage}.judge", columns_in(judge))
    interruption.run(_judge(PairJudge(f"{stage}.judge", judge), pairs, path, config))
    verdicts = iter(record["verdict"] for record in read_jsonl(path))
    return replace(store_rows(_labelled(pairs(), verdicts)), digest=f"{rows.digest}-{digest}")


def _pairs(rows: StoredRows, judge: str, columns: Sequence[str]) -> Iterator[Pair | SkippedRows]:
    for row in rows:
        yield row if isinstance(row, SkippedRows) else _pair(unpack_row(row), judge, columns)


def _pair(row: Row, judge: str, columns: Sequence[str]) -> Pair | SkippedRows:
    """Return the pair in a row, or the record of a skipped row, such as one without a column."""
    try:
        require_columns(columns, row, judge)
        prompt = row_prompt(row)
        a, b = require_text(row, "completion_a"), require_text(row, "completion_b")
    except BadRow as bad:
        missing = "prompt, completion_a or completion_b has no text"
        return SkippedRows(bad.reason, True, bad.explanation or missing)
    if a == b:
        return SkippedRows("equal", True)
    text = prompt if isinstance(prompt, str) else ""
    return Pair(Prompt("", text, (), row), a, b)


async def _judge(
    judge: PairJudge,
    pairs: Callable[[], Iterator[Pair | SkippedRows]],
    path: Path,
    config: Config,
) -> None:
    """Ask for the verdicts that the file lacks."""
    sink = JsonlSink(path)
    sink.truncate_after("pair", math.inf)  # drops a line that a kill cut short
    done = len(read_jsonl(path))
    total = sum(isinstance(pair, Pair) for pair in pairs())
    remaining = islice((pair for pair in pairs() if isinstance(pair, Pair)), done, None)
    try:
        with Progress(config.run.stages).stage("judge", total, "pair", done) as bar:
            while chunk := list(islice(remaining, CHUNK)):
                for verdict in await judge.verdicts(chunk):
                    sink.append({"pair": done, "verdict": verdict})
                    done += 1
                bar.advance(len(chunk))
    finally:
        sink.close()


def _labelled(
    pairs: Iterable[Pair | SkippedRows], verdicts: Iterator[str]
) -> Iterator[Row | SkippedRows]:
    """Yield a stored row, or a record of a skipped one, for each of ``pairs``, in order."""
    for pair in pairs:
        if not isinstance(pair, Pair):
            yield pair
            continue
        verdict = next(verdicts)
        if verdict in SKIPPED:
            yield SKIPPED[verdict]
            continue
        fields = pair.prompt.fields
        chosen, rejected = (pair.a, pair.b) if verdict == "a" else (pair.b, pair.a)
        given = {name: fields[name] for name in _GIVEN if name in fields}
        yield {**given, "chosen": chosen, "rejected": rejected}


def _digest(config: Config, judge: PairJudgeConfig) -> str:
    """Identify what decides the verdicts; the judge's address and time limits are left out."""
    # Without defaults: a key that is newer than a run does not have its pairs judged again.
    sources = [
        source.model_dump(mode="json", exclude_defaults=True)
        for source in config.data.preferences or ()
    ]
    fixed = {name: getattr(judge, name) for name in fixed_keys(PairJudgeConfig)}
    text = json.dumps([sources, fixed], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
