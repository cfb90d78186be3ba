"""Texts, or prompts with answers, as token ids for language modelling."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import datasets

from rlhf_ray.data.reading.counts import BadRow, RowTally, SkippedRows
from rlhf_ray.data.reading.draws import prompt_group
from rlhf_ray.data.reading.rows import (
    Row,
    batches,
    parse_bool,
    require_text,
    row_answer,
    row_prompt,
    row_question,
    row_tools,
)
from rlhf_ray.data.reading.tables import TOKEN_IDS, TokenRow, write_table
from rlhf_ray.data.rendering.render import Renderer, TextSegments, TokenizedRow
from rlhf_ray.data.rendering.tokens import Overlong, overlong_error
from rlhf_ray.errors import DataError

LossOn = Literal["all", "completion", "assistant"]
"""Tokens with a loss: all, the last answer's, or those of every answer of a chat."""

_DOCUMENTS = datasets.Features(
    {
        "token_ids": TOKEN_IDS,
        "learnt": datasets.List(datasets.Value("int8")),
        "group": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class TextRendering:
    """How rows become texts to learn; arguments as those of `load_documents`."""

    renderer: Renderer
    preferred_only: bool = False
    loss_on: LossOn = "all"
    max_tokens: int | None = None
    overlong: Overlong = "drop"


def load_documents(
    rows: Iterable[Row | SkippedRows],
    renderer: Renderer,
    max_bad_share: float = 0.2,
    preferred_only: bool = False,
    loss_on: LossOn = "all",
    name: str = "texts",
    max_tokens: int | None = None,
    overlong: Overlong = "drop",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Tokenize each text, end token included, and store it on disk.

    Args:
        rows: with ``text``, or a prompt and ``completion``, which is used if a row has both.
        preferred_only: leave out rows whose column ``preferred`` is false.
        loss_on: tokens with a loss.
        max_tokens: longest text, end token included; None: any length.
        overlong: what to do with a longer one; ``truncate`` keeps its beginning.

    Returns:
        Columns ``token_ids``, ``learnt`` (1 on tokens with a loss) and ``group`` (the same for
        texts of one prompt), one text a row, and counts: ``kept``, and dropped rows by reason.
    """
    tally = RowTally(name, max_bad_share)
    rendering = TextRendering(renderer, preferred_only, loss_on, max_tokens, overlong)
    return write_table(render_documents(rows, rendering, tally), _DOCUMENTS), tally.finish()


def render_documents(
    rows: Iterable[Row | SkippedRows],
    rendering: TextRendering,
    tally: RowTally,
    numbers: Iterable[int] | None = None,
) -> Iterator[TokenRow]:
    """Yield the texts of rows, with the columns of `load_documents`.

    Args:
        rows: of the dataset.
        rendering: how they become texts.
        tally: counts them all.
        numbers: of the rows in the dataset; None: they are the whole of it.
    """
    limit = sys.maxsize if rendering.max_tokens is None else rendering.max_tokens
    for batch in batches(rows, tally, numbers=numbers):
        texts: dict[int, TextSegments] = {}
        groups = {index: prompt_group(row) for index, row in batch}
        for index, row in batch:
            if rendering.preferred_only and parse_bool(row.get("preferred")) is False:
                tally.drop_unused("not_preferred")
                continue
            try:
                texts[index] = _render(row, rendering.renderer, rendering.loss_on, tally.name)
            except BadRow as bad:
                tally.drop_row(bad)
        tokens = rendering.renderer.tokenize(list(texts.values()))
        for index, rendered in zip(texts, tokens, strict=True):
            learnt = _learnt(rendered, rendering.loss_on)
            num_tokens = len(rendered.token_ids)
            if num_tokens > limit and rendering.overlong == "error":
                raise overlong_error(tally.name, index, num_tokens, limit, "sft.block_size")
            # A cut text may hold nothing of its answer, so there would be nothing to learn.
            if num_tokens > limit and (rendering.overlong == "drop" or not any(learnt[1:limit])):
                tally.drop_bad("overlong")
                continue
            tally.keep()
            kept = {"token_ids": rendered.token_ids[:limit], "learnt": learnt[:limit]}
            yield {**kept, "group": groups[index]}


def _render(row: Row, renderer: Renderer, loss_on: LossOn, name: str) -> TextSegments:
    if "completion" in row and ("prompt" in row or "messages" in row):
        prompt, answer = row_prompt(row), row_answer(row, "completion")
        every_answer, tools = loss_on == "assistant", row_tools(row)
        return renderer.prompt_and_answer(prompt, answer, row_question(row), every_answer, tools)
    if "text" not in row:
        raise DataError(
            f"{name}: no column text, nor prompt and completion; found {', '.join(row)}. Map your "
            "names to these with the dataset's columns, for example columns: {text: <name in your "
            "file>}"
        )
    text = require_text(row, "text")
    if loss_on != "all":
        raise DataError(
            f"{name} holds plain text, so sft.loss_on {loss_on} finds no answer in it; set "
            "sft.loss_on to all, or give rows with prompt and completion, or messages"
        )
    return renderer.text(text)


def _learnt(rendered: TokenizedRow, loss_on: LossOn) -> Sequence[int]:
    num_tokens = len(rendered.token_ids)
    if loss_on == "all":
        return [1] * num_tokens
    if loss_on == "assistant":
        return rendered.answer_mask
    return [int(index >= rendered.num_prompt_tokens) for index in range(num_tokens)]
