"""Rated answers as token ids with a target, for a pointwise reward model."""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import datasets

from rlhf_ray.data.datasets.preferences import truncate_answers
from rlhf_ray.data.reading.counts import BadRow, RowTally, SkippedRows
from rlhf_ray.data.reading.rows import (
    Row,
    batches,
    parse_bool,
    parse_number,
    row_answer,
    row_prompt,
    row_question,
    row_tools,
)
from rlhf_ray.data.reading.tables import TOKEN_IDS, write_table
from rlhf_ray.data.rendering.render import Renderer, TokenizedRow
from rlhf_ray.data.rendering.tokens import Overlong, overlong_error

TargetColumn = Literal["label", "score"]
"""Column with an answer's target: liked or not, or a number."""

_RATED = datasets.Features({"token_ids": TOKEN_IDS, "target": datasets.Value("float32")})


def load_ratings(
    rows: Iterable[Row | SkippedRows],
    renderer: Renderer,
    target_column: TargetColumn,
    max_length: int,
    overlong: Overlong = "drop",
    max_bad_share: float = 0.2,
    name: str = "ratings",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Tokenize prompt, completion and end token, each with the score that a model should give.

    Args as for `load_pairs`, but the rows have a prompt, ``completion`` and ``target_column``,
    where a label becomes 0 or 1. Returns the columns ``token_ids`` and ``target``, and counts.
    """
    tally = RowTally(name, max_bad_share)

    def rated() -> Iterator[Row]:
        for index, target, side in _rendered(rows, renderer, target_column, tally):
            num_tokens = len(side.token_ids)
            if num_tokens > max_length and overlong == "error":
                raise overlong_error(name, index, num_tokens, max_length, "model.max_length")
            if num_tokens > max_length and overlong == "drop":
                tally.drop_bad("overlong")
                continue
            tally.keep()
            _, (token_ids,) = truncate_answers([side], max_length)
            yield {"token_ids": token_ids, "target": target}

    return write_table(rated(), _RATED), tally.finish()


def _rendered(
    rows: Iterable[Row | SkippedRows],
    renderer: Renderer,
    target_column: TargetColumn,
    tally: RowTally,
) -> Iterator[tuple[int, float, TokenizedRow]]:
    """Yield (index, target, tokenized row) of the rows with a prompt, an answer and a target."""
    for batch in batches(rows, tally):
        targets, texts = [], []
        for index, row in batch:
            try:
                target = _target(row, target_column)
                prompt, answer = row_prompt(row), row_answer(row, "completion")
                question, tools = row_question(row), row_tools(row)
                texts.append(renderer.prompt_and_answer(prompt, answer, question, tools=tools))
                targets.append((index, target))
            except BadRow as bad:
                tally.drop_row(bad)
        for (index, target), side in zip(targets, renderer.tokenize(texts), strict=True):
            yield index, target, side


def _target(row: Row, target_column: TargetColumn) -> float:
    value = row.get(target_column)
    if target_column == "label":
        label = parse_bool(value)
        if label is None:
            raise BadRow("no_label", f"the column label must be true or false, got {value!r}")
        return float(label)
    score = parse_number(value)
    if score is None or not math.isfinite(score):
        raise BadRow("no_score", f"the column score must be a number, got {value!r}")
    return score
