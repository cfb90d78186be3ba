"""Tables of rows that lie on disk instead of in memory."""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

TokenRow = Mapping[str, Any]
"""A row of a table of token ids; each loader documents its columns."""

TOKEN_IDS = datasets.List(datasets.Value("int32"))
"""Type of a column of token ids."""


def write_table(
    rows: Iterable[Mapping[str, object]], features: datasets.Features
) -> datasets.Dataset:
    """Write rows one by one to a file and map it into memory, so that at most a batch is held.

    The file is in the system's temporary folder and is unlinked at once: the mapping keeps its
    content, and the space is freed when the table is garbage-collected or the process dies.
    """
    folder = tempfile.mkdtemp(prefix="rows-")
    try:
        path = str(Path(folder) / "rows.arrow")
        with ArrowWriter(features=features, path=path) as writer:
            for row in rows:
                writer.write(dict(row))
            writer.finalize()
        return datasets.Dataset.from_file(path)
    finally:
        shutil.rmtree(folder)
