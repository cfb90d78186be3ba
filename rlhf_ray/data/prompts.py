"""Rows with a ``prompt`` as prompts, ready to be continued."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_ray.data.row_tally import RowTally
from rlhf_ray.data.tokens import Overlong, Row, batches, encode, is_text, overlong_error
from rlhf_ray.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ID_COLUMNS = ("id", "question_id")


def load_prompts(
    rows: Iterable[Any],
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int,
    overlong: Overlong = "drop",
    max_bad_share: float = 0.2,
    name: str = "prompts",
) -> tuple[list[Prompt], dict[str, int]]:
    """Tokenise the ``prompt`` of each row; the other columns go along in ``Prompt.fields``.

    Rows that repeat an ``id`` (or ``question_id``) are kept once, the first time: an evaluation set
    has one row a pair and so several of one question.

    Args:
        rows: a data set, or any rows with a column ``prompt``.
        tokenizer: the policy's.
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
    prompts: dict[str, Prompt] = {}
    first_index = 0
    for batch in batches(rows):
        fresh = _usable(batch, first_index, prompts, tally)
        token_lists = encode(tokenizer, [row["prompt"] for _, _, row in fresh])
        for (index, identity, row), token_ids in zip(fresh, token_lists, strict=True):
            text = row["prompt"]
            if len(token_ids) > max_prompt_tokens:
                if overlong == "error":
                    key = "rollout.max_prompt_tokens"
                    raise overlong_error(name, index, len(token_ids), max_prompt_tokens, key)
                if overlong == "drop":
                    tally.drop_bad("overlong")
                    continue
                token_ids = token_ids[-max_prompt_tokens:]
                text = str(tokenizer.decode(token_ids))
            fields = {column: value for column, value in row.items() if column != "prompt"}
            prompts[identity] = Prompt(identity, text, tuple(token_ids), fields)
            tally.keep()
        first_index += len(batch)
    return list(prompts.values()), tally.finish()


def _usable(
    batch: Sequence[Row], first_index: int, known: dict[str, Prompt], tally: RowTally
) -> list[tuple[int, str, Row]]:
    """(index, id, row) of the rows with text and an id not met before."""
    fresh: dict[str, tuple[int, str, Row]] = {}
    for index, row in enumerate(batch, first_index):
        identity = _identity(row, index)
        if identity in known or identity in fresh:
            tally.drop_unused("repeated")
        elif not is_text(row["prompt"]):
            tally.drop_bad("empty")
        else:
            fresh[identity] = (index, identity, row)
    return list(fresh.values())


def _identity(row: Row, index: int) -> str:
    """The row's id where it has one, else its place."""
    given = (row[column] for column in _ID_COLUMNS if row.get(column) is not None)
    return str(next(given, index))
