"""Rows with ``prompt``, ``chosen`` and ``rejected`` as token ids for a pairwise reward model."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import datasets

from rlhf_ray.data.row_tally import RowTally
from rlhf_ray.data.tokens import Overlong, Row, batches, encode, eos_id, is_text, overlong_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_COLUMNS = ("prompt", "chosen", "rejected")
_Pair = tuple[list[int], list[int]]


def load_pairs(
    rows: Iterable[Any],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    overlong: Overlong = "drop",
    max_bad_share: float = 0.2,
    name: str = "preferences",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Token ids of both sides of each pair: prompt, completion, EOS.

    A reward model reads the last token, so EOS ends each side as it ends a rollout that stopped by
    itself.

    Args:
        rows: a data set, or any rows with the three columns.
        tokenizer: the reward model's.
        max_length: most tokens of a side, EOS included.
        overlong: what becomes of a pair with a longer side; ``truncate`` cuts the end of
            completions and, where these are long too, the prompt's start, at most down to half of
            the room.
        max_bad_share: share of bad pairs (empty, equal, over-long) above which loading stops.
        name: the data set, for messages.

    Returns:
        Columns ``chosen_ids``, ``rejected_ids`` and ``num_prompt_tokens``, and counts: ``kept``,
        and dropped rows by reason.

    Raises:
        DataError: too many bad pairs, nothing left, an over-long one with ``overlong="error"``,
            or a tokenizer without EOS.
    """
    tally = RowTally(name, max_bad_share)
    eos = eos_id(tokenizer)
    chosen_ids: list[list[int]] = []
    rejected_ids: list[list[int]] = []
    prompt_lengths: list[int] = []
    for index, prompt, *completions in _encoded(rows, tokenizer, tally):
        longest = len(prompt) + max(map(len, completions)) + 1
        if longest > max_length:
            if overlong == "error":
                raise overlong_error(name, index, longest, max_length, "model.max_length")
            if overlong == "drop":
                tally.drop_bad("overlong")
                continue
            prompt, *completions = _cut(prompt, completions, max_length - 1)
        chosen, rejected = (prompt + completion + [eos] for completion in completions)
        if chosen == rejected:
            tally.drop_bad("equal")
            continue
        chosen_ids.append(chosen)
        rejected_ids.append(rejected)
        prompt_lengths.append(len(prompt))
        tally.keep()
    counts = tally.finish()
    columns = {
        "chosen_ids": chosen_ids,
        "rejected_ids": rejected_ids,
        "num_prompt_tokens": prompt_lengths,
    }
    return datasets.Dataset.from_dict(columns), counts


def _encoded(
    rows: Iterable[Row], tokenizer: "PreTrainedTokenizerBase", tally: RowTally
) -> Iterator[tuple[int, list[int], list[int], list[int]]]:
    """(index, prompt ids, chosen ids, rejected ids) of the rows in which all three have text."""
    first_index = 0
    for batch in batches(rows):
        whole = [
            (index, row)
            for index, row in enumerate(batch, first_index)
            if all(is_text(row[column]) for column in _COLUMNS)
        ]
        tally.drop_bad("empty", len(batch) - len(whole))
        columns = (encode(tokenizer, [row[column] for _, row in whole]) for column in _COLUMNS)
        yield from zip((index for index, _ in whole), *columns, strict=True)
        first_index += len(batch)


def _cut(prompt: list[int], completions: list[list[int]], room: int) -> list[list[int]]:
    """Prompt and completions cut to ``room`` tokens; both sides keep the same prompt."""
    kept = min(len(prompt), max(room // 2, room - max(map(len, completions))))
    return [prompt[len(prompt) - kept :], *(ids[: room - kept] for ids in completions)]
