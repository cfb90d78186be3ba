"""Rows as every loader gets them, and their storage on disk.

A row's prompt is its ``messages`` (a chat up to the answer) where it has them, else the text in
``prompt``; ``tools`` are those that a chat may call. ``completion``, or ``chosen`` and
``rejected``, are texts, or an assistant's message where it is more than text; ``text`` is a text
without a prompt. Every other column is kept.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import datasets

from rlhf_ray.data.reading.chats import (
    AnswerLike,
    Message,
    PromptLike,
    answer_of,
    is_said,
    parse_messages,
    parse_tools,
)
from rlhf_ray.data.reading.counts import BadRow, RowTally, SkippedRows
from rlhf_ray.data.reading.tables import BATCH, rows_of, write_table

Row = Mapping[str, object]

SOURCE = "_source"
"""Column of a mixture's rows: the number of their dataset, from 0."""

_TEXT_COLUMNS = ("prompt", "text", "completion", "chosen", "rejected")

_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}

_FIELDS = "_fields"
_STORED = datasets.Features({name: datasets.Value("string") for name in (*_TEXT_COLUMNS, _FIELDS)})
"""Columns of a stored row. Datasets of every format share them, so that they can be mixed; all
other cells are JSON in ``_fields``, since their types may differ from row to row."""


@dataclass(frozen=True)
class StoredRows:
    """A dataset's rows; iterating yields the stored rows, then records of the skipped ones.

    Attributes:
        table: the usable rows on disk, with the columns `STORED_FEATURES`.
        skipped: counts of the others.
        digest: of what was read, the same whenever the same is read again.
        num_unread: rows of a larger set of which these were drawn, without being looked at.
    """

    table: datasets.Dataset
    skipped: Sequence[SkippedRows] = ()
    digest: str = ""
    num_unread: int = 0

    def __iter__(self) -> Iterator[Row | SkippedRows]:
        for columns in self.table.iter(BATCH):
            yield from rows_of(columns)  # type: ignore[arg-type]  (typed as a dict or a list)
        yield from self.skipped


def store_rows(rows: Iterable[Row | SkippedRows]) -> StoredRows:
    """Write rows to disk, and add up the skipped ones by reason."""
    skipped: dict[tuple[str, bool], SkippedRows] = {}

    def usable() -> Iterator[Row]:
        for row in rows:
            if not isinstance(row, SkippedRows):
                yield _pack_row(row)
                continue
            key = row.reason, row.is_bad
            earlier = skipped.get(key)
            skipped[key] = replace(earlier, num=earlier.num + row.num) if earlier else row

    table = write_table(usable(), _STORED)
    return StoredRows(table, list(skipped.values()))


def _pack_row(row: Row) -> Row:
    texts = {name: cell for name in _TEXT_COLUMNS if isinstance(cell := row.get(name), str)}
    ours = (*_TEXT_COLUMNS, "messages")
    rest = {
        name: value
        for name, value in row.items()
        if name not in texts and not (name in ours and value is None)
    }
    return {**dict.fromkeys(_TEXT_COLUMNS), **texts, _FIELDS: json.dumps(rest, default=str)}


def unpack_row(row: Row) -> Row:
    """Return a stored row as it was; any other row is returned as it is."""
    packed = row.get(_FIELDS)
    if not isinstance(packed, str):
        return row
    texts = {name: row[name] for name in _TEXT_COLUMNS if row[name] is not None}
    return {**json.loads(packed), **texts}


def require_readable(row: Row) -> None:
    """Check a row as its file has it.

    Raises:
        BadRow: it holds half a character, a score that is not finite, or a column with the name
            of one of ours.
    """
    for name in (_FIELDS, SOURCE):
        if name in row:
            raise BadRow("reserved_column", f"{name} is a column of ours; map it to another name")
    score = parse_number(row.get("score"))
    if score is not None and not math.isfinite(score):
        raise BadRow("score_not_finite", f"the column score must be a number, got {score}")
    try:
        for value in (*row, *row.values()):
            text = value if isinstance(value, str) else _as_text(value)
            if not text.isascii():
                text.encode()
    except UnicodeEncodeError:
        reason = "a text holds half of a character (a lone surrogate), which is not Unicode"
        raise BadRow("not_unicode", reason) from None


def _as_text(value: object) -> str:
    if value is None or isinstance(value, int | float):
        return ""
    return json.dumps(value, ensure_ascii=False, default=str)


def batches(
    rows: Iterable[Row | SkippedRows],
    tally: RowTally,
    size: int = 1000,
    numbers: Iterable[int] | None = None,
) -> Iterator[list[tuple[int, Row]]]:
    """Yield (index, row) in batches: tokenizers are faster on many texts at once.

    ``numbers`` are the indices where the rows were drawn from a larger set.
    """
    numbered = enumerate(rows) if numbers is None else zip(numbers, rows, strict=True)
    while batch := list(islice(numbered, size)):
        usable: list[tuple[int, Row]] = []
        for index, row in batch:
            if isinstance(row, SkippedRows):
                tally.skip(row)
            else:
                usable.append((index, unpack_row(row)))
        yield usable


def row_prompt(row: Row) -> PromptLike:
    """Return the row's messages, else its prompt.

    Raises:
        BadRow: it has neither, or an empty prompt, or messages of another form.
    """
    return parse_messages(row["messages"]) if row.get("messages") else require_text(row, "prompt")


def row_tools(row: Row) -> list[Message]:
    """Return the tools that the row's chat may call.

    Raises:
        BadRow: they are no list of functions, or the row has no chat to call them in.
    """
    tools = parse_tools(row["tools"]) if is_said(row.get("tools")) else []
    if tools and not row.get("messages"):
        raise BadRow("tools", "tools need a chat, and the prompt is plain text")
    return tools


def row_answer(row: Row, column: str) -> AnswerLike:
    """Return an answer: a text with more than white space, or a message with more than text.

    Raises:
        BadRow: it is neither.
    """
    value = row.get(column)
    if not isinstance(value, Mapping):
        return require_text(row, column)
    (message,) = parse_messages(value)
    return answer_of(message)


def row_question(row: Row) -> str | None:
    """Return the bare question of a row whose prompt already has a layout, if there is one."""
    question = row.get("question")
    return question if isinstance(question, str) else None


def require_text(row: Row, column: str) -> str:
    """Return a cell that holds more than white space."""
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty")
    return value


def parse_number(value: object) -> float | None:
    """Parse a number, which csv files hold as text; None where it is none, as true and false are.

    A number too large for a float is infinite.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def parse_bool(value: object) -> bool | None:
    """Parse a label, which csv files hold as text; None where it is neither true nor false."""
    if isinstance(value, str):
        return _TRUTHS.get(value.strip().lower())
    return bool(value) if value in (True, False) else None


def given_values(value: object) -> list[object]:
    """Return a column's value, or each of a list, without what stands for nothing.

    NaN is what tables hold there, and null what JSON does.
    """
    listed = value if isinstance(value, list | tuple) else [value]
    return [item for item in listed if item is not None and item == item]
