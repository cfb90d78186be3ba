"""Rows with a prompt, an answer and its target (label or score), for a pointwise reward model."""

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import datasets

from rlhf_ray.data.datasets.preferences import truncate_answers
from rlhf_ray.data.reading.counts import BadRow, RowTally
from rlhf_ray.data.reading.rows import Row, batches, parse_bool, require_text, row_prompt
from rlhf_ray.data.reading.tables import TOKEN_IDS, write_table
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import Overlong, overlong_error

TargetColumn = Literal["label", "score"]
"""Column with an answer's target: liked or not, or a number."""

_RATED = datasets.Features({"token_ids": TOKEN_IDS, "target": datasets.Value("float32")})


def load_ratings(
    rows: Iterable[Any],
    renderer: Renderer,
    target_column: TargetColumn,
    max_length: int,
    overlong: Overlong = "drop",
    max_bad_share: float = 0.2,
    name: str = "ratings",
) -> tuple[datasets.Dataset, dict[str, int]]:
    """Token ids of prompt, completion and end, with the number that a model should give them.

    Args:
        rows: a dataset, or any rows with a prompt, ``completion`` and the target column.
        renderer: of the reward model's tokenizer.
        target_column: which column; a label comes out as 0 or 1.
        max_length: most tokens of a text, its end included.
        overlong: what becomes of a longer one; ``truncate`` as for pairs.
        max_bad_share: share of rows that cannot be used above which loading stops.
        name: the data set, for messages.

    Returns:
        Columns ``token_ids`` and ``target``, on disk, and counts: ``kept``, and dropped rows by
        reason.

    Raises:
        DataError: too many bad rows, nothing left, or an over-long one with ``overlong="error"``.
    """
    tally = RowTally(name, max_bad_share)

    def rated() -> Iterator[dict[str, Any]]:
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

    found = write_table(rated(), _RATED)
    return found, tally.finish()


def _rendered(
    rows: Iterable[Row], renderer: Renderer, target_column: TargetColumn, tally: RowTally
) -> Iterator[tuple[int, float, Any]]:
    """(place, target, text) of the rows that have all of them."""
    for batch in batches(rows, tally):
        known, layouts = [], []
        for index, row in batch:
            try:
                target = _target(row, target_column)
                answer = require_text(row, "completion")
                layouts.append(
                    renderer.prompt_and_answer(row_prompt(row), answer, row.get("question"))
                )
                known.append((index, target))
            except BadRow as bad:
                tally.drop_row(bad)
        for (index, target), side in zip(known, renderer.tokenize(layouts), strict=True):
            yield index, target, side


def _target(row: Row, target_column: TargetColumn) -> float:
    value = row.get(target_column)
    if target_column == "label":
        truth = parse_bool(value)
        if truth is None:
            raise BadRow("no_label", f"the column label must be true or false, got {value!r}")
        return float(truth)
    try:
        score = math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise BadRow("no_score", f"the column score must be a number, got {value!r}")
    return score
