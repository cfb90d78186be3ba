"""Tables of rows that lie on disk instead of in memory."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter
from pyarrow import ipc

from rlhf_ray.disk import DAMAGE, large_files_folder, unwritable_is_an_error

TokenRow = Mapping[str, Any]
"""A row of a table of token ids; each loader documents its columns."""

TOKEN_IDS = datasets.List(datasets.Value("int32"))
"""Type of a column of token ids."""

BATCH = 1000
"""Rows that are read or copied at once."""


def write_table(
    rows: Iterable[Mapping[str, object]], features: datasets.Features
) -> datasets.Dataset:
    """Write rows one by one to a file and map it into memory, so that at most a batch is held.

    The file is in the folder for large temporary files and is unlinked at once: the mapping keeps
    its content, and the space is freed when the table is garbage-collected or the process dies.
    """
    folder = tempfile.mkdtemp(prefix="rows-", dir=large_files_folder())
    try:
        path = str(Path(folder) / "rows.arrow")
        with ArrowWriter(features=features, path=path) as writer:
            for row in rows:
                writer.write(dict(row))
            writer.finalize()
        return datasets.Dataset.from_file(path)
    finally:
        shutil.rmtree(folder)


def rows_of(columns: Mapping[str, Sequence[object]]) -> Iterator[dict[str, object]]:
    """Yield the rows of a batch as a table gives it, which is faster than row by row."""
    return (dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True))


def cached_table(
    folder: Path, build: Callable[[], tuple[datasets.Dataset, dict[str, Any]]]
) -> tuple[datasets.Dataset, dict[str, Any]]:
    """Load a table and its counts from a folder; where they are not there, build and store them.

    The folder appears whole or not at all, so a run that was killed resumes with what it has built.

    Raises:
        ConfigError: the folder cannot be written.
    """
    file, notes = folder / "rows.arrow", folder / "counts.json"
    try:
        counts = json.loads(notes.read_text(encoding="utf-8"))
        return datasets.Dataset.from_file(str(file)), counts
    except (*DAMAGE, OSError):  # not built yet, or damaged
        table, counts = build()
    with unwritable_is_an_error(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as building:
            whole = Path(building) / folder.name
            whole.mkdir()
            batches = table.with_format("arrow").iter(BATCH)
            with ipc.new_stream(str(whole / file.name), table.features.arrow_schema) as stream:
                for batch in batches:
                    stream.write_table(batch)
            (whole / notes.name).write_text(json.dumps(counts), encoding="utf-8")
            os.replace(whole, folder)
    return datasets.Dataset.from_file(str(file)), counts
