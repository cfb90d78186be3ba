"""Rows with ``text``, or a prompt and ``completion``, as token ids for language modelling."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import datasets

from rlhf_ray.data.reading.counts import BadRow, RowTally
from rlhf_ray.data.reading.rows import Row, batches, parse_bool, require_text, row_prompt
from rlhf_ray.data.reading.tables import TOKEN_IDS, write_table
from rlhf_ray.data.rendering.render import Renderer, TextSegments, TokenizedRow
from rlhf_ray.data.rendering.tokens import Overlong, overlong_error
from rlhf_ray.errors import DataError

LossOn = Literal["all", "completion", "assistant"]
"""Tokens that are learnt: all, the last answer's, or those of every answer of a chat."""

_DOCUMENTS = datasets.Features(
    {"token_ids": TOKEN_IDS, "learnt": datasets.List(datasets.Value("int8"))}
)


def load_documents(
    rows: Iterable[Any],
    renderer: Renderer,
    max_bad_share: float = 0.2,
    preferred_only: bool = False,
    loss_on: LossOn = "all",
    name: str = "texts",
    max_tokens: int | None = None,
    overlong: Overlong = "drop",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Token ids of each text, its end included, on disk.

    Args:
        rows: a data set, or any rows. Where a row has both forms, its completion is used.
        renderer: of the model's tokenizer.
        max_bad_share: share of rows that cannot be used above which loading stops.
        preferred_only: leave out rows whose column ``preferred`` is false.
        loss_on: which tokens are learnt.
        name: the data set, for messages.
        max_tokens: longest text, its end included; None: any length.
        overlong: what becomes of a longer one; ``truncate`` keeps its beginning.

    Returns:
        Columns ``token_ids`` and ``learnt`` (1 on tokens that are), one text a row, and counts:
        ``kept``, and dropped rows by reason.

    Raises:
        DataError: columns are missing, too many bad rows, nothing left, or plain text where only
            answers are to be learnt.
    """
    tally = RowTally(name, max_bad_share)
    limit = sys.maxsize if max_tokens is None else max_tokens

    def documents() -> Iterator[dict[str, Sequence[int]]]:
        for batch in batches(rows, tally):
            wanted = [item for item in batch if not _is_unwanted(item[1], preferred_only)]
            tally.drop_unused("not_preferred", len(batch) - len(wanted))
            found = [(place, _layout(row, renderer, loss_on, tally)) for place, row in wanted]
            layouts = {place: layout for place, layout in found if layout is not None}
            all_rendered = renderer.tokenize(list(layouts.values()))
            for place, rendered in zip(layouts, all_rendered, strict=True):
                learnt = _learnt(rendered, loss_on)
                num_tokens = len(rendered.token_ids)
                if num_tokens > limit and overlong == "error":
                    raise overlong_error(name, place, num_tokens, limit, "sft.block_size")
                # What is left of a cut text may hold nothing of its answer.
                if num_tokens > limit and (overlong == "drop" or not any(learnt[1:limit])):
                    tally.drop_bad("overlong")
                    continue
                tally.keep()
                yield {"token_ids": rendered.token_ids[:limit], "learnt": learnt[:limit]}

    found = write_table(documents(), _DOCUMENTS)
    return found, tally.finish()


def _is_unwanted(row: Row, preferred_only: bool) -> bool:
    return preferred_only and parse_bool(row.get("preferred")) is False


def _layout(row: Row, renderer: Renderer, loss_on: LossOn, tally: RowTally) -> TextSegments | None:
    """What the row comes to; None, and counted, where it cannot be used."""
    try:
        if "completion" in row and ("prompt" in row or "messages" in row):
            prompt, answer = row_prompt(row), require_text(row, "completion")
            return renderer.prompt_and_answer(
                prompt, answer, row.get("question"), loss_on == "assistant"
            )
        if "text" not in row:
            raise DataError(
                f"{tally.name}: no column text, nor prompt and completion; found {', '.join(row)}. "
                "Map them in the data set's columns"
            )
        text = require_text(row, "text")
    except BadRow as bad:
        tally.drop_row(bad)
        return None
    if loss_on != "all":
        raise DataError(
            f"{tally.name} holds plain text, without an answer to learn alone; set sft.loss_on to "
            f"all (it is {loss_on}), or give rows with prompt and completion, or messages"
        )
    return renderer.text(text)


def _learnt(rendered: TokenizedRow, loss_on: LossOn) -> Sequence[int]:
    num_tokens = len(rendered.token_ids)
    if loss_on == "all":
        return [1] * num_tokens
    if loss_on == "assistant":
        return rendered.answer_mask
    return [int(place >= rendered.num_prompt_tokens) for place in range(num_tokens)]
