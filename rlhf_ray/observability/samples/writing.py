"""Append recorded samples, and cut them back to a commit without reading the texts."""

import json
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_ray.disk import AppendedFile, unwritable_is_an_error
from rlhf_ray.observability.samples.index import (
    INDEX,
    TEXTS,
    header,
    read_header,
    row_of,
    row_type,
    rows_of_texts,
)
from rlhf_ray.observability.sinks import finite


class SampleWriter:
    """Writes the two files of recorded samples.

    The texts go first: a reader leaves out rows whose texts are not there yet. What a full disk
    refuses is kept and written later, as by `AppendedFile`.
    """

    def __init__(self, folder: Path, sources: Sequence[str], kept: int) -> None:
        """Cut the files back to an iteration.

        Args:
            folder: of the stage ppo.
            sources: names of the reward sources.
            kept: the last iteration whose samples stay; -1: none do.

        Raises:
            ConfigError: the files cannot be written.
        """
        texts, index = folder / TEXTS, folder / INDEX
        self._sources = [*sources]
        with unwritable_is_an_error(texts):
            folder.mkdir(parents=True, exist_ok=True)
            found = read_header(index)
            if found is None or found[0] != self._sources:
                _make_index(texts, index, self._sources)
            self._end = _cut_back(texts, index, self._sources, kept)
        self._texts, self._index = AppendedFile(texts), AppendedFile(index)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append the samples of an iteration, in the order of their positions."""
        lines, rows = list[bytes](), list[bytes]()
        for record in records:
            text = json.dumps(finite(record), ensure_ascii=False, allow_nan=False)
            line = text.encode(errors="replace") + b"\n"
            rows.append(row_of(record, self._end, len(line), self._sources))
            lines.append(line)
            self._end += len(line)
        self._texts.write(b"".join(lines))
        self._index.write(b"".join(rows))

    def flush(self) -> None:
        """Write what a full disk has refused; raises OSError if it still does."""
        self._texts.flush()
        self._index.flush()

    def sync(self) -> None:
        """Make the samples so far durable."""
        self._texts.sync()
        self._index.sync()

    def close(self) -> None:
        """Write the rest and close the files."""
        self._texts.close()
        self._index.close()


def _make_index(texts: Path, index: Path, sources: Sequence[str]) -> None:
    """Make the index from the texts, line by line: of an older run, or of other sources."""
    temporary = index.with_name(f".{index.name}.tmp")
    with temporary.open("wb") as file:
        file.write(header(sources))
        file.writelines(rows_of_texts(texts, sources))
    os.replace(temporary, index)


def _cut_back(texts: Path, index: Path, sources: Sequence[str], kept: int) -> int:
    """Cut both files after an iteration; return where the texts then end, bytes.

    Rows are in the order of iterations. Whichever file a kill leaves longer, the next cut makes
    them fit again.
    """
    kind, begin = row_type(len(sources)), len(header(sources))
    num_bytes = texts.stat().st_size if texts.exists() else 0
    num_rows = (index.stat().st_size - begin) // kind.itemsize
    end = 0
    with index.open("r+b") as file:

        def row(number: int) -> np.void:
            file.seek(begin + number * kind.itemsize)
            return np.frombuffer(file.read(kind.itemsize), kind)[0]

        def stays(number: int) -> bool:
            found = row(number)
            is_whole = int(found["offset"]) + int(found["size"]) <= num_bytes
            return is_whole and int(found["iteration"]) <= kept

        num_kept = bisect_left(range(num_rows), True, key=lambda number: not stays(number))
        if num_kept:
            last = row(num_kept - 1)
            end = int(last["offset"]) + int(last["size"])
        file.truncate(begin + num_kept * kind.itemsize)
    if num_bytes > end:
        os.truncate(texts, end)
    return end
