"""Rows as every loader gets them, and their storage on disk.

A row's prompt is its ``messages`` (a chat up to the answer) where it has them, else the text in
``prompt``. ``completion``, or ``chosen`` and ``rejected``, are texts; ``text`` is a text without a
prompt. Every other column is kept.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import datasets

from rlhf_ray.data.reading.chats import PromptLike, parse_messages
from rlhf_ray.data.reading.counts import BadRow, RowTally, SkippedRows
from rlhf_ray.data.reading.tables import write_table

Row = Mapping[str, object]

SOURCE = "_source"
"""Column of a mixture's rows: the number of their dataset, from 0."""

_TEXT_COLUMNS = ("prompt", "text", "completion", "chosen", "rejected")

_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}

STORED_FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in (*_TEXT_COLUMNS, "_fields")}
    | {"messages": datasets.List({name: datasets.Value("string") for name in ("role", "content")})}
)
"""Columns of a stored row. Datasets of every format share them, so that they can be mixed; all
other columns are JSON in ``_fields``, since their types may differ from row to row."""


@dataclass(frozen=True)
class StoredRows:
    """A dataset's rows; iterating yields the stored rows, then records of the skipped ones.

    Attributes:
        table: the usable rows on disk, with the columns `STORED_FEATURES`.
        skipped: counts of the others.
    """

    table: datasets.Dataset
    skipped: Sequence[SkippedRows] = ()

    def __iter__(self) -> Iterator[Row | SkippedRows]:
        yield from self.table  # type: ignore[misc]  (rows of a Dataset are mappings)
        yield from self.skipped


def store_rows(rows: Iterable[Row | SkippedRows]) -> StoredRows:
    """Write rows with the columns `STORED_FEATURES` to disk; add up the skipped ones by reason."""
    skipped: dict[tuple[str, bool], SkippedRows] = {}

    def usable() -> Iterator[Row]:
        for row in rows:
            if not isinstance(row, SkippedRows):
                yield row
                continue
            key = row.reason, row.is_bad
            earlier = skipped.get(key)
            skipped[key] = replace(earlier, num=earlier.num + row.num) if earlier else row

    table = write_table(usable(), STORED_FEATURES)
    return StoredRows(table, list(skipped.values()))


def pack_row(row: Row) -> Row:
    """Convert a row to the columns `STORED_FEATURES`."""
    cells = {name: row.get(name) for name in _TEXT_COLUMNS}
    texts = {name: cell if isinstance(cell, str) else None for name, cell in cells.items()}
    fields = {name: value for name, value in row.items() if name not in STORED_FEATURES}
    messages = row.get("messages") or None
    return {**texts, "messages": messages, "_fields": json.dumps(fields, default=str)}


def unpack_row(row: Row) -> Row:
    """Reverse `pack_row`; a row that was not packed is returned as it is."""
    packed = row.get("_fields")
    if not isinstance(packed, str):
        return row
    names = (name for name in STORED_FEATURES if name != "_fields")
    return {
        **json.loads(packed),
        **{name: row[name] for name in names if row[name] is not None},
    }


def batches(
    rows: Iterable[Row | SkippedRows], tally: RowTally, size: int = 1000
) -> Iterator[list[tuple[int, Row]]]:
    """Yield (index, row) in batches: tokenizers are faster on many texts at once."""
    numbered = enumerate(rows)
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


def row_question(row: Row) -> str | None:
    """Return the bare question of a row whose prompt already has a layout, if there is one."""
    question = row.get("question")
    return question if isinstance(question, str) else None


def require_text(row: Row, column: str) -> str:
    """Return a cell that holds more than white space.

    Raises:
        BadRow: it does not.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty")
    return value


def parse_bool(value: object) -> bool | None:
    """Parse a label, which csv files hold as text; None where it is neither true nor false."""
    if isinstance(value, str):
        return _TRUTHS.get(value.strip().lower())
    return bool(value) if value in (True, False) else None
