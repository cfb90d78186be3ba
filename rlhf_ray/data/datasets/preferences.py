"""Preference pairs as token ids, for a pairwise reward model or DPO."""

from collections.abc import Iterable, Iterator, Sequence

import datasets

from rlhf_ray.data.reading.counts import BadRow, RowTally, SkippedRows
from rlhf_ray.data.reading.rows import (
    Row,
    batches,
    row_answer,
    row_prompt,
    row_question,
    row_tools,
)
from rlhf_ray.data.reading.tables import TOKEN_IDS, write_table
from rlhf_ray.data.rendering.render import Renderer, TextSegments, TokenizedRow
from rlhf_ray.data.rendering.tokens import Overlong, overlong_error

_PAIRS = datasets.Features(
    {
        "chosen_ids": TOKEN_IDS,
        "rejected_ids": TOKEN_IDS,
        "num_prompt_tokens": datasets.Value("int32"),
    }
)


def load_pairs(
    rows: Iterable[Row | SkippedRows],
    renderer: Renderer,
    max_length: int,
    overlong: Overlong = "drop",
    max_bad_share: float = 0.2,
    name: str = "preferences",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Tokenize both sides of each pair: prompt, completion, end token.

    A reward model scores at the last token, so each side ends with the token with which a rollout
    that stops by itself ends.

    Args:
        rows: with a prompt, ``chosen`` and ``rejected``.
        renderer: of the model's tokenizer.
        max_length: most tokens of a side, end token included.
        overlong: what to do with a pair with a longer side; ``truncate`` as `truncate_answers`.
        max_bad_share: share of bad pairs (empty, equal, over-long) above which loading stops.
        name: the dataset, for messages.

    Returns:
        Columns ``chosen_ids``, ``rejected_ids`` and ``num_prompt_tokens``, on disk, and counts:
        ``kept``, and dropped rows by reason.

    Raises:
        DataError: too many bad pairs, nothing left, or an over-long one with ``overlong="error"``.
    """
    tally = RowTally(name, max_bad_share)

    def pairs() -> Iterator[Row]:
        for index, *sides in _rendered(rows, renderer, tally):
            longest = max(len(side.token_ids) for side in sides)
            if longest > max_length and overlong == "error":
                raise overlong_error(name, index, longest, max_length, "model.max_length")
            if longest > max_length and overlong == "drop":
                tally.drop_bad("overlong")
                continue
            num_prompt, (chosen, rejected) = truncate_answers(sides, max_length)
            if chosen == rejected:
                tally.drop_bad("equal")
                continue
            tally.keep()
            yield {"chosen_ids": chosen, "rejected_ids": rejected, "num_prompt_tokens": num_prompt}

    return write_table(pairs(), _PAIRS), tally.finish()


def _rendered(
    rows: Iterable[Row | SkippedRows], renderer: Renderer, tally: RowTally
) -> Iterator[tuple[int, TokenizedRow, TokenizedRow]]:
    """Yield (index, chosen, rejected) of the rows whose prompt and answers have text."""
    for batch in batches(rows, tally):
        indices: list[int] = []
        texts: list[TextSegments] = []
        for index, row in batch:
            try:
                texts += _render(row, renderer)
                indices.append(index)
            except BadRow as bad:
                tally.drop_row(bad)
        sides = renderer.tokenize(texts)
        yield from zip(indices, sides[0::2], sides[1::2], strict=True)


def _render(row: Row, renderer: Renderer) -> list[TextSegments]:
    prompt, question, tools = row_prompt(row), row_question(row), row_tools(row)
    answers = [row_answer(row, column) for column in ("chosen", "rejected")]
    return [renderer.prompt_and_answer(prompt, each, question, tools=tools) for each in answers]


def truncate_answers(sides: Sequence[TokenizedRow], max_length: int) -> tuple[int, list[list[int]]]:
    """Cut answers to the same prompt to ``max_length`` tokens, end tokens kept.

    The ends of the answers are cut and, where these are long too, the prompt's start, which keeps
    at least half of the tokens. All sides keep the same part of the prompt.

    Returns:
        Number of prompt tokens, and the token ids of each side.
    """
    limit = max_length - 1
    num_prompt = sides[0].num_prompt_tokens
    prompt = sides[0].token_ids[:num_prompt]
    answers = [side.token_ids[num_prompt:-1] for side in sides]
    kept = min(num_prompt, max(limit // 2, limit - max(map(len, answers))))
    return kept, [
        [*prompt[num_prompt - kept :], *answer[: limit - kept], side.token_ids[-1]]
        for answer, side in zip(answers, sides, strict=True)
    ]
