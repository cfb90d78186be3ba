"""Prompts for sampling, rendered, tokenized and stored on disk."""

import json
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import overload

import datasets

from rlhf_ray.data.reading.counts import BadRow, RowTally, SkippedRows
from rlhf_ray.data.reading.rows import SOURCE, Row, batches, row_prompt, row_question, row_tools
from rlhf_ray.data.reading.tables import TOKEN_IDS, write_table
from rlhf_ray.data.rendering.render import Renderer, TextSegments
from rlhf_ray.data.rendering.tokens import Overlong, overlong_error
from rlhf_ray.types import Prompt

_ID_COLUMNS = ("id", "question_id")
_NO_FIELDS = ("prompt", "messages", SOURCE)
_PROMPTS = datasets.Features(
    {name: datasets.Value("string") for name in ("id", "text", "fields")} | {"token_ids": TOKEN_IDS}
)


class Prompts(Sequence[Prompt]):
    """Prompts on disk; each is read when it is indexed."""

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> "Prompts": ...
    def __getitem__(self, index: int | slice) -> "Prompt | Prompts":
        if isinstance(index, slice):
            return Prompts(self._table.select(range(*index.indices(len(self)))))
        row = self._table[index]
        return Prompt(row["id"], row["text"], tuple(row["token_ids"]), json.loads(row["fields"]))


def load_prompts(
    rows: Iterable[Row | SkippedRows],
    renderer: Renderer,
    max_prompt_tokens: int,
    overlong: Overlong = "drop",
    max_bad_share: float = 0.2,
    name: str = "prompts",
) -> tuple[Prompts, dict[str, int]]:
    """Render the prompt of each row; the other columns become ``Prompt.fields``.

    Wherever a template was applied, ``Prompt.fields["messages"]`` holds the chat: a judge, or a
    model with another template, needs it instead of the rendered text.

    Of rows with the same ``id`` (or ``question_id``) the first is kept: an evaluation set has one
    row a pair and so several of one question. In a mixture, ids are compared within a dataset.

    Args:
        overlong: what to do with a longer one; ``truncate`` keeps its end, which the model
            continues.
        max_bad_share: share of bad rows (empty, over-long) above which loading stops.

    Returns:
        Prompts in the order of the rows, and counts: ``kept``, and dropped rows by reason.

    Raises:
        DataError: too many bad rows, nothing left, or an over-long one with ``overlong="error"``.
    """
    tally = RowTally(name, max_bad_share)
    prompts = _rendered(rows, renderer, max_prompt_tokens, overlong, tally)
    return Prompts(write_table(prompts, _PROMPTS)), tally.finish()


def _rendered(
    rows: Iterable[Row | SkippedRows],
    renderer: Renderer,
    max_prompt_tokens: int,
    overlong: Overlong,
    tally: RowTally,
) -> Iterator[Row]:
    """Yield rows with the columns `_PROMPTS`."""
    seen: set[str | int] = set()
    for batch in batches(rows, tally):
        fresh = _usable(batch, renderer, seen, tally)
        rendered = renderer.tokenize([texts for *_, texts in fresh], ended=False)
        for (index, row_id, row, texts), tokens in zip(fresh, rendered, strict=True):
            token_ids = tokens.token_ids
            text = renderer.visible_text(texts)
            if len(token_ids) > max_prompt_tokens:
                if overlong == "error":
                    key = "rollout.max_prompt_tokens"
                    raise overlong_error(tally.name, index, len(token_ids), max_prompt_tokens, key)
                if overlong == "drop":
                    tally.drop_bad("overlong")
                    continue
                token_ids = token_ids[-max_prompt_tokens:]
                text = renderer.strip_bos(str(renderer.tokenizer.decode(token_ids)))
            fields = json.dumps(_fields(row, renderer), default=str)
            seen.add(row_id)
            tally.keep()
            yield {"id": str(row_id), "text": text, "token_ids": token_ids, "fields": fields}


def _usable(
    batch: Sequence[tuple[int, Row]],
    renderer: Renderer,
    seen: Container[str | int],
    tally: RowTally,
) -> list[tuple[int, str | int, Row, TextSegments]]:
    """Return (index, id, row, texts) of the rows with a prompt and an id not seen before."""
    fresh: dict[str | int, tuple[int, str | int, Row, TextSegments]] = {}
    for index, row in batch:
        row_id = _row_id(row, index)
        if row_id in seen or row_id in fresh:
            tally.drop_unused("repeated")
            continue
        try:
            texts = renderer.prompt(row_prompt(row), row_question(row), row_tools(row))
        except BadRow as bad:
            tally.drop_row(bad)
            continue
        fresh[row_id] = (index, row_id, row, texts)
    return list(fresh.values())


def _fields(row: Row, renderer: Renderer) -> Row:
    fields = {name: value for name, value in row.items() if name not in _NO_FIELDS}
    messages = renderer.messages(row_prompt(row), row_question(row))
    return fields if messages is None else {**fields, "messages": messages}


def _row_id(row: Row, index: int) -> str | int:
    """Return the row's id as text if it has one, else its index: a number, which no id equals."""
    value = next((row[name] for name in _ID_COLUMNS if row.get(name) is not None), None)
    if value is None:
        return index
    return f"{row[SOURCE]}:{value}" if SOURCE in row else str(value)
