"""Rows that lie in a file and not in memory."""

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter

TOKEN_IDS = datasets.List(datasets.Value("int32"))
"""A column of token ids."""


def write_table(rows: Iterable[Mapping[str, Any]], features: datasets.Features) -> datasets.Dataset:
    """Write rows one by one and map the file into memory: no more than a batch is ever held.

    The file lies in the system's temporary folder and has no name any more: its space is free again
    as soon as the data set is gone.

    Raises:
        OSError: the file cannot be written.
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
