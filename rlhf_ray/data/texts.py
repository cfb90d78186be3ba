"""Rows with ``text``, or ``prompt`` and ``completion``, as token ids for language modelling."""

from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any

from rlhf_ray.data.row_tally import RowTally
from rlhf_ray.data.tokens import Row, batches, encode, is_text
from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_token_lists(
    rows: Iterable[Any],
    tokenizer: "PreTrainedTokenizerBase",
    max_bad_share: float = 0.2,
    preferred_only: bool = False,
    name: str = "texts",
) -> tuple[list[list[int]], dict[str, int]]:
    """Token ids of each text, without EOS: packing adds it.

    Args:
        rows: a data set, or any rows. Where a row has both forms, prompt and completion are used.
        tokenizer: the model's.
        max_bad_share: share of rows without text above which loading stops.
        preferred_only: leave out rows whose column ``preferred`` is false.
        name: the data set, for messages.

    Returns:
        Ids of one text a row, and counts: ``kept``, and dropped rows by reason.

    Raises:
        DataError: columns are missing, too many bad rows, or nothing left.
    """
    tally = RowTally(name, max_bad_share)
    token_lists: list[list[int]] = []
    for batch in batches(rows):
        columns = _columns(batch[0], name)
        wanted = [row for row in batch if not (preferred_only and row.get("preferred") is False)]
        whole = [row for row in wanted if all(is_text(row[column]) for column in columns)]
        tally.drop_unused("not_preferred", len(batch) - len(wanted))
        tally.drop_bad("empty", len(wanted) - len(whole))
        tally.keep(len(whole))
        parts = (encode(tokenizer, [row[column] for row in whole]) for column in columns)
        token_lists.extend(list(chain(*pieces)) for pieces in zip(*parts, strict=True))
    return token_lists, tally.finish()


def _columns(row: Row, name: str) -> tuple[str, ...]:
    if "prompt" in row and "completion" in row:
        return ("prompt", "completion")
    if "text" in row:
        return ("text",)
    raise DataError(
        f"{name}: no column text, nor prompt and completion; found {', '.join(row)}. Map them "
        "in the data set's columns"
    )
