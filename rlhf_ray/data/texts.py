"""Rows with ``text``, or a prompt and ``completion``, as token ids for language modelling."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import datasets

from rlhf_ray.data.render import Layout, Rendered, Renderer
from rlhf_ray.data.row_tally import BadRow, RowTally
from rlhf_ray.data.rows import Row, batches, prompt_of, text_of
from rlhf_ray.data.tables import TOKEN_IDS, on_disk
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
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Token ids of each text, its end included, on disk.

    Args:
        rows: a data set, or any rows. Where a row has both forms, its completion is used.
        renderer: of the model's tokenizer.
        max_bad_share: share of rows that cannot be used above which loading stops.
        preferred_only: leave out rows whose column ``preferred`` is false.
        loss_on: which tokens are learnt.
        name: the data set, for messages.

    Returns:
        Columns ``token_ids`` and ``learnt`` (1 on tokens that are), one text a row, and counts:
        ``kept``, and dropped rows by reason.

    Raises:
        DataError: columns are missing, too many bad rows, nothing left, or plain text where only
            answers are to be learnt.
    """
    tally = RowTally(name, max_bad_share)

    def documents() -> Iterator[dict[str, Sequence[int]]]:
        for batch in batches(rows, tally):
            wanted = [row for _, row in batch if not _is_unwanted(row, preferred_only)]
            tally.drop_unused("not_preferred", len(batch) - len(wanted))
            layouts = [_layout(row, renderer, loss_on, tally) for row in wanted]
            for rendered in renderer.tokenize([layout for layout in layouts if layout]):
                tally.keep()
                yield {"token_ids": rendered.token_ids, "learnt": _learnt(rendered, loss_on)}

    found = on_disk(documents(), _DOCUMENTS)
    return found, tally.finish()


def _is_unwanted(row: Row, preferred_only: bool) -> bool:
    return preferred_only and row.get("preferred") is False


def _layout(row: Row, renderer: Renderer, loss_on: LossOn, tally: RowTally) -> Layout | None:
    """What the row comes to; None, and counted, where it cannot be used."""
    try:
        if "completion" in row and ("prompt" in row or "messages" in row):
            prompt, answer = prompt_of(row), text_of(row, "completion")
            return renderer.answered(prompt, answer, row.get("question"), loss_on == "assistant")
        if "text" not in row:
            raise DataError(
                f"{tally.name}: no column text, nor prompt and completion; found {', '.join(row)}. "
                "Map them in the data set's columns"
            )
        text = text_of(row, "text")
    except BadRow as bad:
        tally.refuse(bad)
        return None
    if loss_on != "all":
        raise DataError(
            f"{tally.name} holds plain text, without an answer to learn alone; set sft.loss_on to "
            f"all (it is {loss_on}), or give rows with prompt and completion, or messages"
        )
    return renderer.text(text)


def _learnt(rendered: Rendered, loss_on: LossOn) -> Sequence[int]:
    num_tokens = len(rendered.token_ids)
    if loss_on == "all":
        return [1] * num_tokens
    if loss_on == "assistant":
        return rendered.answer_mask
    return [int(place >= rendered.num_prompt_tokens) for place in range(num_tokens)]
