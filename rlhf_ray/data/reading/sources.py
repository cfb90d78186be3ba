"""Loads datasets: reads their rows, renames columns, filters, converts, and mixes several."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import datasets
import numpy as np

from rlhf_ray.config.data import DataSource
from rlhf_ray.config.section import is_mapping
from rlhf_ray.data.reading.counts import BadRow, RowTally, SkippedRows
from rlhf_ray.data.reading.filters import Predicate, build_predicate
from rlhf_ray.data.reading.formats import ReadOptions, Use, convert, detect_format
from rlhf_ray.data.reading.hub_layouts import in_our_names
from rlhf_ray.data.reading.readers import read_rows
from rlhf_ray.data.reading.rows import SOURCE, Row, StoredRows, store_rows
from rlhf_ray.errors import DataError
from rlhf_ray.plugins import load_function


def load_rows(
    sources: Sequence[DataSource],
    use: Use,
    max_pairs: int = 10,
    seed: int = 0,
    on_row: Callable[[Row], None] = lambda row: None,
) -> StoredRows:
    """Read datasets row by row, convert and mix them, and store the rows on disk.

    Args:
        sources: the user's datasets: where they are, how their columns are named, what to keep.
        use: what the rows are for.
        max_pairs: most pairs of one question, where a format holds scored or labelled answers.
        seed: of the draw if there are more pairs.
        on_row: called with each usable row, in the form of `rlhf_ray.data.reading.rows`.

    Returns:
        Rows for `rlhf_ray.data.reading.rows.batches`. Weights are shares of the usable rows.

    Raises:
        DataError: a dataset cannot be read, is empty, or lacks columns; or one of several has no
            usable row.
        ConfigError: a filter's function cannot be imported.
    """
    loaded = []
    for number, source in enumerate(sources):
        origin = {SOURCE: number} if len(sources) > 1 else {}
        prepare = _preparation(source)
        options = ReadOptions(source.label, use, max_pairs, seed, prepare)
        rows = _converted(source, options, on_row)
        loaded.append(
            store_rows(row if isinstance(row, SkippedRows) else {**row, **origin} for row in rows)
        )
    return loaded[0] if len(loaded) == 1 else _mix(sources, loaded)


def _mix(sources: Sequence[DataSource], loaded: Sequence[StoredRows]) -> StoredRows:
    for source, rows in zip(sources, loaded, strict=True):
        if not len(rows.table):
            tally = RowTally(source.label, 1.0)
            for skipped in rows.skipped:
                tally.skip(skipped)
            tally.finish()  # raises, with the reasons
    tables = [rows.table for rows in loaded]
    order = interleave([len(table) for table in tables], [source.weight for source in sources])
    skipped = [*chain.from_iterable(rows.skipped for rows in loaded)]
    if num_left := sum(map(len, tables)) - len(order):
        skipped.append(SkippedRows("over_weight", is_bad=False, num=num_left))
    return StoredRows(datasets.concatenate_datasets(tables).select(order), skipped)


def interleave(sizes: Sequence[int], weights: Sequence[float | None]) -> np.ndarray:
    """Return the rows that a mixture takes, in their order.

    Rows of each dataset keep their order and are spread evenly over the whole, so that any part of
    it has the same shares. No row is repeated: the
    first rows of each dataset are taken until one of the datasets is exhausted.

    Args:
        sizes: number of rows of each dataset.
        weights: shares, in proportion to each other; all None: every row of every dataset.

    Returns:
        [N] row indices in the concatenation of the datasets.

    Example:
        >>> interleave([4, 2], [None, None]).tolist()
        [0, 4, 1, 2, 5, 3]
    """
    pairs = zip(sizes, weights, strict=True)
    shares = [float(size) if weight is None else weight for size, weight in pairs]
    scale = min(size / share for size, share in zip(sizes, shares, strict=True))
    # Without the margin the rounding of size / share * share could cost a row.
    counts = [int(scale * share + 1e-6) for share in shares]
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    ranges = zip(starts, counts, strict=True)
    indices = np.concatenate([start + np.arange(count) for start, count in ranges])
    depths = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return indices[np.argsort(depths, kind="stable")]


def _converted(
    source: DataSource, options: ReadOptions, on_row: Callable[[Row], None]
) -> Iterator[Row | SkippedRows]:
    """Yield a dataset's rows in our form, up to its limit."""
    raw = read_rows(source, "prompt" if options.use == "prompts" else "text")
    first = next(raw, None)
    if first is None:
        raise DataError(
            f"{source.label} (split {source.split}) holds no rows; give a file with at least one"
        )
    try:
        columns = list(options.prepare(first))
    except BadRow as bad:
        raise DataError(f"{source.label}: in its first row {bad.explanation}") from bad
    row_format = detect_format(columns, source.format, options)
    passes = build_predicate(source.filter, source.label)
    num_kept = 0
    for row in convert(chain([first], raw), row_format, options):
        if not isinstance(row, SkippedRows):
            row = _filtered(row, passes)
        if not isinstance(row, SkippedRows):
            on_row(row)
        yield row
        num_kept += not isinstance(row, SkippedRows) or row.is_bad
        if num_kept == source.limit:
            return


def _preparation(source: DataSource) -> Callable[[Row], Row]:
    """Return what makes of a dataset's row one with our columns: the user's function, renaming.

    It raises `BadRow` where the function fails.

    Raises:
        ConfigError: the function cannot be imported.
    """
    function = load_function(source.function, "function") if source.function else None
    columns_are_known = False

    def prepare(row: Row) -> Row:
        nonlocal columns_are_known
        if function is not None:
            row = _returned(function, row)
        if not columns_are_known:
            _check_columns(source, row)
            columns_are_known = True
        return in_our_names(_renamed(source, row))

    return prepare


def _returned(function: Callable[[Row], object], row: Row) -> Row:
    try:
        made = function(row)
    except Exception as error:  # a user's function may raise anything
        failure = f"{type(error).__name__}: {error}"
        raise BadRow("function_fails", f"the dataset's function fails: {failure}") from error
    if isinstance(made, str):
        return {"text": made}
    if is_mapping(made):
        return dict(made)
    returned = f"the dataset's function returns {type(made).__name__}, expected a row or a text"
    raise BadRow("function_fails", returned)


def _filtered(row: Row, passes: Predicate) -> Row | SkippedRows:
    try:
        return row if passes(row) else SkippedRows("filtered", is_bad=False)
    except BadRow as bad:
        return SkippedRows(bad.reason, is_bad=True, explanation=bad.explanation)


def _check_columns(source: DataSource, first: Row) -> None:
    names = list(source.columns.values())
    missing = [name for name in names if name not in first]
    if missing:
        raise DataError(
            f"{source.label} has no column {', '.join(missing)}, which the dataset's columns name; "
            f"found {', '.join(first)}"
        )
    if len(set(names)) < len(names):
        raise DataError(
            f"{source.label}: the dataset's columns name one column twice ({', '.join(names)}); "
            "give each of our names a column of its own"
        )


def _renamed(source: DataSource, row: Row) -> Row:
    """Return the row under our names; a column that already has one of these names is dropped."""
    theirs = set(source.columns.values())
    rest = {
        name: value
        for name, value in row.items()
        if name not in theirs and name not in source.columns
    }
    return rest | {our: row.get(their) for our, their in source.columns.items()}
