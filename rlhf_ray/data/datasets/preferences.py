"""Rows with a prompt, ``chosen`` and ``rejected`` as token ids for a pairwise reward model."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets

from rlhf_ray.data.reading.counts import BadRow, RowTally
from rlhf_ray.data.reading.rows import Row, batches, require_text, row_prompt
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
    rows: Iterable[Any],
    renderer: Renderer,
    max_length: int,
    overlong: Overlong = "drop",
    max_bad_share: float = 0.2,
    name: str = "preferences",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Token ids of both sides of each pair: prompt, completion, end.

    A reward model reads the last token, so the end token ends each side as it ends a rollout that
    stopped by itself.

    Args:
        rows: a data set, or any rows with a prompt and the two columns.
        renderer: of the reward model's tokenizer.
        max_length: most tokens of a side, its end included.
        overlong: what becomes of a pair with a longer side; ``truncate`` cuts the end of
            completions and, where these are long too, the prompt's start, at most down to half of
            the room.
        max_bad_share: share of bad pairs (empty, equal, over-long) above which loading stops.
        name: the data set, for messages.

    Returns:
        Columns ``chosen_ids``, ``rejected_ids`` and ``num_prompt_tokens``, on disk, and counts:
        ``kept``, and dropped rows by reason.

    Raises:
        DataError: too many bad pairs, nothing left, or an over-long one with ``overlong="error"``.
    """
    tally = RowTally(name, max_bad_share)

    def pairs() -> Iterator[dict[str, Any]]:
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
            yield {
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "num_prompt_tokens": num_prompt,
            }

    found = write_table(pairs(), _PAIRS)
    return found, tally.finish()


def _rendered(
    rows: Iterable[Row], renderer: Renderer, tally: RowTally
) -> Iterator[tuple[int, TokenizedRow, TokenizedRow]]:
    """(place, chosen, rejected) of the rows in which all three have text."""
    for batch in batches(rows, tally):
        places: list[int] = []
        layouts: list[TextSegments] = []
        for index, row in batch:
            try:
                layouts += _layouts(row, renderer)
                places.append(index)
            except BadRow as bad:
                tally.drop_row(bad)
        sides = renderer.tokenize(layouts)
        yield from zip(places, sides[0::2], sides[1::2], strict=True)


def _layouts(row: Row, renderer: Renderer) -> list[TextSegments]:
    prompt, question = row_prompt(row), row.get("question")
    answers = [require_text(row, column) for column in ("chosen", "rejected")]
    return [renderer.prompt_and_answer(prompt, answer, question) for answer in answers]


def truncate_answers(sides: Sequence[TokenizedRow], max_length: int) -> tuple[int, list[list[int]]]:
    """Prompt tokens, and texts cut to ``max_length`` with the same prompt and their ends."""
    room = max_length - 1
    num_prompt = sides[0].num_prompt_tokens
    prompt = sides[0].token_ids[:num_prompt]
    answers = [side.token_ids[num_prompt:-1] for side in sides]
    kept = min(num_prompt, max(room // 2, room - max(map(len, answers))))
    return kept, [
        [*prompt[num_prompt - kept :], *answer[: room - kept], side.token_ids[-1]]
        for answer, side in zip(answers, sides, strict=True)
    ]
