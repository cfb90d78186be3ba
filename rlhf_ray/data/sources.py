"""Data sets of the user's own, read from files."""

import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from pyarrow import csv, parquet

from rlhf_ray.config.data import DataSource
from rlhf_ray.errors import DataError


def load_rows(source: DataSource, required: Sequence[str]) -> datasets.Dataset:
    """Read a data set, name its columns as we do, check them.

    Args:
        source: where it is, how its columns are named, how many rows to read.
        required: columns that must be there after renaming and hold text.

    Raises:
        DataError: the file cannot be read, is empty, or lacks a column.
    """
    path = Path(source.path)
    rows = _renamed(_read(path, source.limit), source)
    missing = [name for name in required if name not in rows.column_names]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}; found {', '.join(rows.column_names)}. "
            f"Map them in the data set's columns, for example columns: {{{missing[0]}: <its name>}}"
        )
    for name in required:
        kind = getattr(rows.features[name], "dtype", "nested")
        if kind not in ("string", "large_string"):
            raise DataError(f"{path}: column {name} holds {kind} values, expected text")
    if not len(rows):
        raise DataError(f"{path} holds no rows")
    return rows if source.limit is None else rows.select(range(min(source.limit, len(rows))))


def _read(path: Path, limit: int | None) -> datasets.Dataset:
    if not path.exists():
        raise DataError(f"{path} does not exist; correct the data set's path")
    if path.is_dir():
        return _read_folder(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: cannot read {path.suffix or 'a file without a suffix'}; give "
            f"{', '.join(_READERS)}, or a folder saved by datasets"
        )
    try:
        return reader(path, limit)
    except (pa.ArrowException, ValueError, TypeError, OSError) as error:
        raise DataError(f"Cannot read {path} as {path.suffix[1:]}: {error}") from error


def _read_folder(path: Path) -> datasets.Dataset:
    try:
        loaded = datasets.load_from_disk(str(path))
    except (pa.ArrowException, ValueError, OSError) as error:
        raise DataError(
            f"{path} is a folder, but not one that datasets' save_to_disk wrote ({error}); "
            "name a file, or such a folder"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        splits = [str(split) for split in loaded]
        raise DataError(
            f"{path} holds the splits {', '.join(splits)}; name one of them: {path / splits[0]}"
        )
    return loaded


def _read_json(path: Path, limit: int | None) -> datasets.Dataset:
    """Either a list of objects, or one object a line."""
    with path.open(encoding="utf-8-sig") as file:
        is_list = file.read(1) == "["
        file.seek(0)
        if is_list:
            rows = json.load(file)[:limit]
        else:
            numbered = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            rows = [_parse_line(number, line) for number, line in islice(numbered, limit)]
    if not rows:
        raise ValueError("it holds no rows")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {index} is {type(row).__name__}, expected an object")
    names = dict.fromkeys(name for row in rows for name in row)
    return datasets.Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})


def _parse_line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error})") from None


def _read_parquet(path: Path, limit: int | None) -> datasets.Dataset:
    return datasets.Dataset(_first(parquet.read_table(path), limit))


def _read_csv(path: Path, limit: int | None) -> datasets.Dataset:
    options = csv.ParseOptions(newlines_in_values=True)
    return datasets.Dataset(_first(csv.read_csv(path, parse_options=options), limit))


def _first(table: pa.Table, limit: int | None) -> pa.Table:
    return table if limit is None else table.slice(0, limit)


_READERS: dict[str, Callable[[Path, int | None], datasets.Dataset]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _renamed(rows: datasets.Dataset, source: DataSource) -> datasets.Dataset:
    theirs = list(source.columns.values())
    missing = [name for name in theirs if name not in rows.column_names]
    if missing:
        raise DataError(
            f"{source.path} has no column {', '.join(missing)}, which columns names; found "
            f"{', '.join(rows.column_names)}"
        )
    if len(set(theirs)) < len(theirs):
        raise DataError(f"{source.path}: columns names one column twice ({', '.join(theirs)})")
    hidden = [name for name in source.columns if name in rows.column_names and name not in theirs]
    return rows.remove_columns(hidden).rename_columns(
        {their: our for our, their in source.columns.items() if their != our}
    )
