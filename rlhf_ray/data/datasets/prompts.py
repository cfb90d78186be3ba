"""Rows with a prompt as prompts, ready to be continued."""

import json
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any, overload

import datasets

from rlhf_ray.data.reading.counts import BadRow, RowTally
from rlhf_ray.data.reading.rows import SOURCE, Row, batches, row_prompt
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
    """Prompts that lie on disk; one is read when it is asked for."""

    def __init__(self, table: datasets.Dataset) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, place: int) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> "Prompts": ...
    def __getitem__(self, place: int | slice) -> "Prompt | Prompts":
        if isinstance(place, slice):
            return Prompts(self._table.select(range(*place.indices(len(self)))))
        row = self._table[place]
        return Prompt(row["id"], row["text"], tuple(row["token_ids"]), json.loads(row["fields"]))


def load_prompts(
    rows: Iterable[Any],
    renderer: Renderer,
    max_prompt_tokens: int,
    overlong: Overlong = "drop",
    max_bad_share: float = 0.2,
    name: str = "prompts",
) -> tuple[Prompts, dict[str, int]]:
    """Render the prompt of each row; the other columns go along in ``Prompt.fields``.

    ``Prompt.fields["messages"]`` is there wherever a template was applied: what a model with a
    template of its own, or a judge, has to be given instead of the rendered text.

    Rows that repeat an ``id`` (or ``question_id``) are kept once, the first time: an evaluation set
    has one row a pair and so several of one question. In a mixture ids are those of a source.

    Args:
        rows: a data set, or any rows with a prompt.
        renderer: of the policy's tokenizer.
        max_prompt_tokens: longest prompt, tokens.
        overlong: what becomes of a longer one; ``truncate`` keeps its end, which the model
            continues.
        max_bad_share: share of empty and dropped over-long rows above which loading stops.
        name: the data set, for messages.

    Returns:
        Prompts in the order of the rows, and counts: ``kept``, and dropped rows by reason.

    Raises:
        DataError: too many bad rows, nothing left, or an over-long one with ``overlong="error"``.
    """
    tally = RowTally(name, max_bad_share)
    prompts = _rendered(rows, renderer, max_prompt_tokens, overlong, tally)
    table = write_table(prompts, _PROMPTS)
    return Prompts(table), tally.finish()


def _rendered(
    rows: Iterable[Any],
    renderer: Renderer,
    max_prompt_tokens: int,
    overlong: Overlong,
    tally: RowTally,
) -> Iterator[dict[str, Any]]:
    """Rows such as `_PROMPTS`."""
    known: set[str | int] = set()
    for batch in batches(rows, tally):
        fresh = _usable(batch, renderer, known, tally)
        rendered = renderer.tokenize([layout for *_, layout in fresh], ended=False)
        for (index, identity, row, layout), tokens in zip(fresh, rendered, strict=True):
            token_ids = tokens.token_ids
            text = renderer.visible_text(layout)
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
            known.add(identity)
            tally.keep()
            yield {"id": str(identity), "text": text, "token_ids": token_ids, "fields": fields}


def _usable(
    batch: Sequence[tuple[int, Row]],
    renderer: Renderer,
    known: Container[str | int],
    tally: RowTally,
) -> list[tuple[int, str | int, Row, TextSegments]]:
    """(place, id, row, layout) of the rows with a prompt and an id not met before."""
    fresh: dict[str | int, tuple[int, str | int, Row, TextSegments]] = {}
    for index, row in batch:
        identity = _identity(row, index)
        if identity in known or identity in fresh:
            tally.drop_unused("repeated")
            continue
        try:
            layout = renderer.prompt(row_prompt(row), row.get("question"))
        except BadRow as bad:
            tally.drop_row(bad)
            continue
        fresh[identity] = (index, identity, row, layout)
    return list(fresh.values())


def _fields(row: Row, renderer: Renderer) -> dict[str, Any]:
    fields = {name: value for name, value in row.items() if name not in _NO_FIELDS}
    messages = renderer.messages(row_prompt(row), row.get("question"))
    return fields if messages is None else {**fields, "messages": messages}


def _identity(row: Row, index: int) -> str | int:
    """The row's id as text where it has one, else its place: a number, which no id equals."""
    given = next((row[name] for name in _ID_COLUMNS if row.get(name) is not None), None)
    if given is None:
        return index
    return f"{row[SOURCE]}:{given}" if SOURCE in row else str(given)
