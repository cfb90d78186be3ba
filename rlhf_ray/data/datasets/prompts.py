"""Prompts for sampling, rendered, tokenized and stored on disk."""

import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import datasets

from rlhf_ray.data.reading.counts import BadRow, RowTally, SkippedRows
from rlhf_ray.data.reading.draws import split_groups, text_group
from rlhf_ray.data.reading.rows import (
    SOURCE,
    Row,
    batches,
    row_prompt,
    row_question,
    row_tools,
)
from rlhf_ray.data.reading.tables import TOKEN_IDS, write_table
from rlhf_ray.data.rendering.render import Renderer, TextSegments
from rlhf_ray.data.rendering.tokens import Overlong, overlong_error
from rlhf_ray.types import Prompt

Check = Callable[[Row], None]
"""Raises `BadRow` for the fields of a prompt that its reader could not use."""

_ID_COLUMNS = ("id", "question_id")
_NO_FIELDS = ("prompt", "messages", SOURCE)
PROMPT_COLUMNS = datasets.Features(
    {name: datasets.Value("string") for name in ("id", "text", "fields", "row_id")}
    | {"token_ids": TOKEN_IDS, "group": datasets.Value("int64")}
)
"""Of a prompt on disk: ``row_id`` is the row's own id, empty if it has none, and ``group`` stands
for the rendered text: rows that have both in common are repeated."""

Seen = dict[str, set[int]]
"""The row's id -> groups of the prompts with it."""


@dataclass(frozen=True)
class PromptRendering:
    """How rows become prompts; arguments as those of `load_prompts`."""

    renderer: Renderer
    max_prompt_tokens: int
    overlong: Overlong = "drop"
    checks: Sequence[Check] = ()


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

    def split(self, num_held_out: int, seed: int) -> "tuple[Prompts, Prompts]":
        """Split into prompts to train on, in their order, and a sample that is held out."""
        groups = [text_group(text) for text in self._table["text"]]
        parts = split_groups(groups, num_held_out, seed)
        train, held_out = (Prompts(self._table.select(rows)) for rows in parts)
        return train, held_out

    def sample(self, num: int, seed: int) -> list[Prompt]:
        """Return at most ``num`` prompts, drawn; a smaller sample is part of a larger one."""
        order = list(range(len(self)))
        random.Random(f"prompts:{seed}").shuffle(order)
        return [self[index] for index in sorted(order[:num])]


def load_prompts(
    rows: Iterable[Row | SkippedRows],
    renderer: Renderer,
    max_prompt_tokens: int,
    overlong: Overlong = "drop",
    max_bad_share: float = 0.2,
    name: str = "prompts",
    checks: Sequence[Check] = (),
) -> tuple[Prompts, dict[str, int]]:
    """Render the prompt of each row; the other columns become ``Prompt.fields``.

    Wherever a template was applied, ``Prompt.fields["messages"]`` holds the chat: a judge, or a
    model with another template, needs it instead of the rendered text.

    Of rows with the same ``id`` (or ``question_id``) and prompt the first is kept: an evaluation
    set has one row a pair and so several of one question. An id that is blank, NaN or shared by
    other prompts identifies nothing. In a mixture, ids are compared within a dataset.

    Args:
        overlong: what to do with a longer one; ``truncate`` keeps its end, which the model
            continues.
        max_bad_share: share of bad rows (such as empty ones) above which loading stops.
        checks: of those who read the prompts later; a row that one of them refuses is a bad row.

    Returns:
        Prompts in the order of the rows, and counts: ``kept``, dropped rows by reason, and
        ``kept_without_identity``.

    Raises:
        DataError: too many bad rows, nothing left, or an over-long one with ``overlong="error"``.
    """
    tally = RowTally(name, max_bad_share)
    rendering = PromptRendering(renderer, max_prompt_tokens, overlong, checks)
    prompts = render_prompts(rows, rendering, tally, {})
    return Prompts(write_table(prompts, PROMPT_COLUMNS)), tally.finish()


def render_prompts(
    rows: Iterable[Row | SkippedRows],
    rendering: PromptRendering,
    tally: RowTally,
    seen: Seen,
    numbers: Iterable[int] | None = None,
) -> Iterator[Row]:
    """Yield the prompts of rows, with the columns `PROMPT_COLUMNS`.

    Args:
        rows: of the dataset.
        rendering: how they become prompts.
        tally: counts them all.
        seen: prompts before these; new ones are added.
        numbers: of the rows in the dataset; None: they are the whole of it.
    """
    renderer, limit = rendering.renderer, rendering.max_prompt_tokens
    for batch in batches(rows, tally, numbers=numbers):
        fresh = _usable(batch, rendering, seen, tally)
        rendered = renderer.tokenize([texts for *_, texts in fresh], ended=False)
        for (index, prompt, texts), tokens in zip(fresh, rendered, strict=True):
            token_ids = tokens.token_ids
            text = renderer.visible_text(texts)
            if len(token_ids) > limit:
                if rendering.overlong == "error":
                    key = "rollout.max_prompt_tokens"
                    raise overlong_error(tally.name, index, len(token_ids), limit, key)
                if rendering.overlong == "drop":
                    # Left out by request: nothing is wrong with a long question.
                    tally.drop_unused("overlong")
                    continue
                token_ids = token_ids[-limit:]
                text = renderer.strip_bos(str(renderer.tokenizer.decode(token_ids)))
            tally.keep()
            yield {**prompt, "text": text, "token_ids": token_ids}


def _usable(
    batch: Sequence[tuple[int, Row]], rendering: PromptRendering, seen: Seen, tally: RowTally
) -> list[tuple[int, Row, TextSegments]]:
    """Return (index, columns, texts) of the rows with a prompt that is not repeated."""
    renderer = rendering.renderer
    fresh: list[tuple[int, Row, TextSegments]] = []
    for index, row in batch:
        try:
            texts = renderer.prompt(row_prompt(row), row_question(row), row_tools(row))
            fields = _fields(row, renderer)
            for check in rendering.checks:
                check(fields)
        except BadRow as bad:
            tally.drop_row(bad)
            continue
        row_id, group = _row_id(row), text_group("".join(texts.texts))
        prompt_id = row_id or str(index)
        if row_id:
            prompts = seen.setdefault(row_id, set())
            if group in prompts:
                tally.drop_unused("repeated")
                continue
            if prompts:  # other prompts have this id, so it identifies none of them
                prompt_id += f"#{index}"
                tally.note("without_identity")
            prompts.add(group)
        elif row_id is not None:
            tally.note("without_identity")
        stored = json.dumps(fields, default=str)
        columns = {"id": prompt_id, "row_id": row_id or "", "group": group, "fields": stored}
        fresh.append((index, columns, texts))
    return fresh


def _fields(row: Row, renderer: Renderer) -> Row:
    fields = {name: value for name, value in row.items() if name not in _NO_FIELDS}
    messages = renderer.messages(row_prompt(row), row_question(row))
    return fields if messages is None else {**fields, "messages": messages}


def _row_id(row: Row) -> str | None:
    """Return the row's id as text: empty where it is blank or NaN, None where it has none."""
    values = [row[name] for name in _ID_COLUMNS if row.get(name) is not None]
    # NaN is what tables hold where nothing is.
    texts = [text for value in values if value == value and (text := str(value).strip())]
    if not texts:
        return "" if values else None
    return f"{row[SOURCE]}:{texts[0]}" if SOURCE in row else texts[0]
