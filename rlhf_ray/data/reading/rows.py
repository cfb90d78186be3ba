"""Rows as every loader reads them.

A row's prompt is its ``messages`` (the turns of a chat up to the answer) where it has them, else
the text in ``prompt``; ``completion``, or ``chosen`` and ``rejected``, are texts; ``text`` is one
without a prompt; every other column goes along.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import datasets

from rlhf_ray.data.reading.chats import PromptLike, parse_messages
from rlhf_ray.data.reading.counts import BadRow, RowTally
from rlhf_ray.data.reading.tables import write_table

Row = Mapping[str, Any]


TEXT_COLUMNS = ("prompt", "text", "completion", "chosen", "rejected")
"""Columns of text that a stored row has."""

SOURCE = "_source"
"""Field of a mixture's rows: the number of their data set, from 0."""

_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}

STORED_FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in (*TEXT_COLUMNS, "_fields")}
    | {"messages": datasets.List({name: datasets.Value("string") for name in ("role", "content")})}
)
"""One table for rows of every format, so that they can be mixed; ``_fields`` is JSON."""


@dataclass(frozen=True)
class StoredRows:
    """A data set's rows; iterating gives them, and then the skipped.

    Attributes:
        table: the rows that can be used, such as `STORED_FEATURES`, on disk.
        skipped: what stands for the others: ``_bad`` (and ``_why``) or ``_unused`` names a reason,
            ``_num`` the rows that were left out for it.
    """

    table: datasets.Dataset
    skipped: Sequence[Row] = ()

    def __iter__(self) -> Iterator[Any]:
        yield from self.table
        yield from self.skipped


def store_rows(rows: Iterable[Row]) -> StoredRows:
    """Write the rows that can be used to disk and count the marked ones.

    Args:
        rows: such as `STORED_FEATURES`, or skipped; a mark without ``_num`` stands for one row.
    """
    skipped: dict[tuple[str | None, str | None], dict[str, Any]] = {}

    def usable() -> Iterator[Row]:
        for row in rows:
            if not is_skipped(row):
                yield row
                continue
            mark = skipped.setdefault((row.get("_bad"), row.get("_unused")), {**row, "_num": 0})
            mark["_num"] += row.get("_num", 1)

    table = write_table(usable(), STORED_FEATURES)
    return StoredRows(table, list(skipped.values()))


def is_skipped(row: Row) -> bool:
    """Whether it stands for rows that are left out."""
    return "_bad" in row or "_unused" in row


def batches(
    rows: Iterable[Row], tally: RowTally, size: int = 1000
) -> Iterator[list[tuple[int, Row]]]:
    """Rows with their places, at most ``size`` at once: tokenizers are faster on many texts.

    Args:
        rows: plain ones, or such as `STORED_FEATURES`.
        tally: counts the rows that skipped stand for; these are left out.
        size: most rows of a batch.
    """
    numbered = enumerate(rows)
    while batch := list(islice(numbered, size)):
        plain = ((place, unpack_row(row)) for place, row in batch)
        yield [(place, row) for place, row in plain if not _is_counted(row, tally)]


def unpack_row(row: Row) -> Row:
    """A row such as `STORED_FEATURES` as a plain one; a plain one as it is."""
    if "_fields" not in row:
        return row
    own = {
        name: row[name] for name in STORED_FEATURES if name != "_fields" and row[name] is not None
    }
    return {**json.loads(row["_fields"]), **own}


def _is_counted(row: Row, tally: RowTally) -> bool:
    num = row.get("_num", 1)
    if "_bad" in row:
        tally.drop_row(BadRow(row["_bad"], row.get("_why", "")), num)
    if "_unused" in row:
        tally.drop_unused(row["_unused"], num)
    return is_skipped(row)


def row_prompt(row: Row) -> PromptLike:
    """The row's messages, else its prompt.

    Raises:
        BadRow: it has neither, or an empty one.
    """
    return parse_messages(row["messages"]) if row.get("messages") else require_text(row, "prompt")


def parse_bool(value: Any) -> bool | None:
    """A cell as true or false, in words or figures where a file holds text alone; else None."""
    if isinstance(value, str):
        return _TRUTHS.get(value.strip().lower())
    return bool(value) if value in (True, False) else None


def require_text(row: Row, column: str) -> str:
    """A cell that holds text with something in it.

    Raises:
        BadRow: it does not.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty")
    return value
