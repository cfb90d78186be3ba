"""Rows as every loader reads them.

A row's prompt is its ``messages`` (the turns of a chat up to the answer) where it has them, else
the text in ``prompt``; ``completion``, or ``chosen`` and ``rejected``, are texts; ``text`` is one
without a prompt; every other column goes along.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from rlhf_ray.data.row_tally import BadRow

Row = Mapping[str, Any]

Message = Mapping[str, str]
"""One turn of a chat: ``role`` (system, user, assistant) and ``content``."""

PromptLike = str | Sequence[Message]
"""A prompt as text, or as the turns of a chat up to the answer."""


def batches(rows: Iterable[Row], size: int = 1000) -> Iterator[list[tuple[int, Row]]]:
    """Rows with their places, at most ``size`` at once: tokenizers are faster on many texts."""
    numbered = enumerate(rows)
    while batch := list(islice(numbered, size)):
        yield batch


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
