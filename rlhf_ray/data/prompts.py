"""Rows with a prompt as prompts, ready to be continued."""

from collections.abc import Container, Iterable, Sequence
from typing import Any

from rlhf_ray.data.render import Layout, Renderer
from rlhf_ray.data.row_tally import BadRow, RowTally
from rlhf_ray.data.rows import SOURCE, Row, batches, prompt_of
from rlhf_ray.data.tokens import Overlong, overlong_error
from rlhf_ray.types import Prompt

_ID_COLUMNS = ("id", "question_id")
_NO_FIELDS = ("prompt", "messages", SOURCE)


def load_prompts(
    rows: Iterable[Any],
    renderer: Renderer,
    max_prompt_tokens: int,
    overlong: Overlong = "drop",
    max_bad_share: float = 0.2,
    name: str = "prompts",
) -> tuple[list[Prompt], dict[str, int]]:
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
    prompts: dict[str | int, Prompt] = {}
    for batch in batches(rows, tally):
        fresh = _usable(batch, renderer, prompts, tally)
        rendered = renderer.tokenize([layout for *_, layout in fresh], ended=False)
        for (index, identity, row, layout), tokens in zip(fresh, rendered, strict=True):
            token_ids = tokens.token_ids
            text = renderer.written(layout)
            if len(token_ids) > max_prompt_tokens:
                if overlong == "error":
                    key = "rollout.max_prompt_tokens"
                    raise overlong_error(name, index, len(token_ids), max_prompt_tokens, key)
                if overlong == "drop":
                    tally.drop_bad("overlong")
                    continue
                token_ids = token_ids[-max_prompt_tokens:]
                text = renderer.without_start(str(renderer.tokenizer.decode(token_ids)))
            fields = _fields(row, renderer)
            prompts[identity] = Prompt(str(identity), text, tuple(token_ids), fields)
            tally.keep()
    return list(prompts.values()), tally.finish()


def _usable(
    batch: Sequence[tuple[int, Row]],
    renderer: Renderer,
    known: Container[str | int],
    tally: RowTally,
) -> list[tuple[int, str | int, Row, Layout]]:
    """(place, id, row, layout) of the rows with a prompt and an id not met before."""
    fresh: dict[str | int, tuple[int, str | int, Row, Layout]] = {}
    for index, row in batch:
        identity = _identity(row, index)
        if identity in known or identity in fresh:
            tally.drop_unused("repeated")
            continue
        try:
            layout = renderer.prompt(prompt_of(row), row.get("question"))
        except BadRow as bad:
            tally.refuse(bad)
            continue
        fresh[identity] = (index, identity, row, layout)
    return list(fresh.values())


def _fields(row: Row, renderer: Renderer) -> dict[str, Any]:
    fields = {name: value for name, value in row.items() if name not in _NO_FIELDS}
    messages = renderer.messages(prompt_of(row), row.get("question"))
    return fields if messages is None else {**fields, "messages": messages}


def _identity(row: Row, index: int) -> str | int:
    """The row's id as text where it has one, else its place: a number, which no id equals."""
    given = next((row[name] for name in _ID_COLUMNS if row.get(name) is not None), None)
    if given is None:
        return index
    return f"{row[SOURCE]}:{given}" if SOURCE in row else str(given)
