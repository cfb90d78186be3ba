"""Rows as every loader reads them.

A row's prompt is its ``messages`` (the turns of a chat up to the answer) where it has them, else
the text in ``prompt``; ``completion``, or ``chosen`` and ``rejected``, are texts; ``text`` is one
without a prompt; every other column goes along.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import datasets

from rlhf_ray.data.row_tally import BadRow, RowTally

Row = Mapping[str, Any]

Message = Mapping[str, str]
"""One turn of a chat: ``role`` (system, user, assistant) and ``content``."""

PromptLike = str | Sequence[Message]
"""A prompt as text, or as the turns of a chat up to the answer."""


TEXTS = ("prompt", "text", "completion", "chosen", "rejected", "_bad", "_why", "_unused")
"""Columns of text that a stored row has. ``_bad`` and ``_why`` mark a row that cannot be used,
``_unused`` a good one that has no place here."""

STORED = datasets.Features(
    {name: datasets.Value("string") for name in (*TEXTS, "_fields")}
    | {"messages": datasets.List({name: datasets.Value("string") for name in ("role", "content")})}
)
"""One table for rows of every format, so that they can be mixed; ``_fields`` is JSON."""


def batches(
    rows: Iterable[Row], tally: RowTally, size: int = 1000
) -> Iterator[list[tuple[int, Row]]]:
    """Rows with their places, at most ``size`` at once: tokenizers are faster on many texts.

    Args:
        rows: plain ones, or such as `STORED`.
        tally: counts the rows that are marked; these are left out.
        size: most rows of a batch.
    """
    numbered = enumerate(rows)
    while batch := list(islice(numbered, size)):
        plain = ((place, opened(row)) for place, row in batch)
        yield [(place, row) for place, row in plain if not _is_marked(row, tally)]


def opened(row: Row) -> Row:
    """A row such as `STORED` as a plain one; a plain one as it is."""
    if "_fields" not in row:
        return row
    own = {name: row[name] for name in STORED if name != "_fields" and row[name] is not None}
    return {**json.loads(row["_fields"]), **own}


def _is_marked(row: Row, tally: RowTally) -> bool:
    if "_bad" in row:
        tally.refuse(BadRow(row["_bad"], row.get("_why", "")))
    if "_unused" in row:
        tally.drop_unused(row["_unused"])
    return "_bad" in row or "_unused" in row


def prompt_of(row: Row) -> PromptLike:
    """The row's messages, else its prompt.

    Raises:
        BadRow: it has neither, or an empty one.
    """
    return list(row["messages"]) if row.get("messages") else text_of(row, "prompt")


def text_of(row: Row, column: str) -> str:
    """A cell that holds text with something in it.

    Raises:
        BadRow: it does not.
    """
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("empty")
    return value
