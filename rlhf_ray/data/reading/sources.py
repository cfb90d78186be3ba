"""Data sets of the user's own, as rows that every loader reads."""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import datasets
import numpy as np

from rlhf_ray.config.data import DataSource
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.filters import build_predicate
from rlhf_ray.data.reading.formats import Reading, Use, convert, tell
from rlhf_ray.data.reading.readers import RawRow, read_rows
from rlhf_ray.data.reading.rows import (
    SOURCE,
    STORED_FEATURES,
    TEXT_COLUMNS,
    Row,
    StoredRows,
    batches,
    is_skipped,
    store_rows,
)
from rlhf_ray.errors import DataError


def load_rows(
    sources: Sequence[DataSource],
    use: Use,
    max_pairs: int = 10,
    seed: int = 0,
    on_row: Callable[[Row], None] = lambda row: None,
) -> StoredRows:
    """Read data sets, name their columns as we do, mix them; on disk, in bounded memory.

    Args:
        sources: where they are, how their columns are named, what to keep of them.
        use: what the rows are for.
        max_pairs: most pairs of one question, where a format holds scored or labelled answers.
        seed: of the draw among more pairs.
        on_row: called with each row that can be used, as `rlhf_ray.data.reading.rows` describes it.

    Returns:
        Rows for `rlhf_ray.data.reading.rows.batches`. Weights are shares of those that can be used.

    Raises:
        DataError: a source cannot be read, is empty, or lacks columns; or one of several leaves
            nothing that can be used.
        ConfigError: a filter's function cannot be imported.
    """
    parts = []
    for number, source in enumerate(sources):
        origin = {SOURCE: number} if len(sources) > 1 else {}
        rows = _rows(source, Reading(source.path, use, max_pairs, seed), on_row)
        parts.append(
            store_rows(row if is_skipped(row) else _stored({**row, **origin}) for row in rows)
        )
    return parts[0] if len(parts) == 1 else _mixed(sources, parts)


def _mixed(sources: Sequence[DataSource], parts: Sequence[StoredRows]) -> StoredRows:
    for source, part in zip(sources, parts, strict=True):
        if not len(part.table):
            tally = RowTally(source.path, 1.0)
            list(batches(part.skipped, tally))
            tally.finish()
    tables = [part.table for part in parts]
    order = interleave([len(table) for table in tables], [source.weight for source in sources])
    rest = sum(map(len, tables)) - len(order)
    skipped = [*chain.from_iterable(part.skipped for part in parts)]
    if rest:
        skipped.append({"_unused": "over_weight", "_num": rest})
    return StoredRows(datasets.concatenate_datasets(tables).select(order), skipped)


def interleave(sizes: Sequence[int], weights: Sequence[float | None]) -> np.ndarray:
    """Which rows a mixture takes, and in which order.

    Rows of each set keep their order and are spread evenly over the whole, so that any part of it
    (such as the last rows, which are held out) has the same shares. Nothing is repeated: the
    first rows of each set are taken until one of them is used up.

    Args:
        sizes: rows of each set.
        weights: shares, in proportion to each other; all None: every row of every set.

    Returns:
        [N] places in the concatenation of the sets.

    Example:
        >>> interleave([4, 2], [None, None]).tolist()
        [0, 4, 1, 2, 5, 3]
    """
    given = zip(sizes, weights, strict=True)
    shares = [float(size) if weight is None else weight for size, weight in given]
    scale = min(size / share for size, share in zip(sizes, shares, strict=True))
    # The rounding of 3 / 0.3 must not cost a row.
    counts = [int(scale * share + 1e-6) for share in shares]
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    taken = zip(starts, counts, strict=True)
    places = np.concatenate([start + np.arange(count) for start, count in taken])
    depths = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return places[np.argsort(depths, kind="stable")]


def _rows(source: DataSource, reading: Reading, on_row: Callable[[Row], None]) -> Iterator[Row]:
    """A source's rows, as many as its limit says, and skipped."""
    raw = read_rows(source)
    first = next(raw, None)
    if first is None:
        raise DataError(f"{source.path} holds no rows")
    _check_mapping(source, first)
    columns = _renamed(source, first)
    form = tell(list(columns), source.format, reading)
    renamed = (_renamed(source, row) for row in chain([first], raw))
    passes = build_predicate(source.filter, source.path)
    num_kept = 0
    for row in convert(renamed, form, reading):
        if not is_skipped(row) and not passes(row):
            row = {"_unused": "filtered"}
        if not is_skipped(row):
            on_row(row)
        yield row
        num_kept += "_unused" not in row
        if num_kept == source.limit:
            return


def _check_mapping(source: DataSource, first: RawRow) -> None:
    theirs = list(source.columns.values())
    missing = [name for name in theirs if name not in first]
    if missing:
        raise DataError(
            f"{source.path} has no column {', '.join(missing)}, which columns names; found "
            f"{', '.join(first)}"
        )
    if len(set(theirs)) < len(theirs):
        raise DataError(f"{source.path}: columns names one column twice ({', '.join(theirs)})")


def _renamed(source: DataSource, row: RawRow) -> RawRow:
    """The row under our names; a column that has one of these names already gives way."""
    theirs = set(source.columns.values())
    rest = {
        name: value
        for name, value in row.items()
        if name not in theirs and name not in source.columns
    }
    return rest | {our: row.get(their) for our, their in source.columns.items()}


def _stored(row: Row) -> dict[str, Any]:
    """The row as columns of text: what has no column of its own goes into one, as JSON."""
    cells = {name: row.get(name) for name in TEXT_COLUMNS}
    stored = {name: cell if isinstance(cell, str) else None for name, cell in cells.items()}
    fields = {name: value for name, value in row.items() if name not in STORED_FEATURES}
    messages = [dict(message) for message in row.get("messages") or []] or None
    return {**stored, "messages": messages, "_fields": json.dumps(fields, default=str)}
