"""Filter, sort and read recorded samples, in memory that does not grow with the run.

Numbers are looked up in the index, read a block at a time; the texts of a page are read by their
offsets. A search in the texts reads them in order, for a few seconds at most, and says how far it
came.
"""

import json
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import DataError
from rlhf_ray.observability.samples.index import (
    HAS_TOKENS,
    INDEX,
    TEXTS,
    read_header,
    row_type,
)
from rlhf_ray.observability.sinks import record_of

BLOCK, TEXT_BLOCK = 65536, 2048
"""Rows of the index that are held at a time: without and with their texts."""
MOST_SORTED = 10_000
"""Samples that can be paged through in another order than that of the run."""
SEARCH_S = 2.0
"""Longest time that a search in the texts takes, seconds."""
SORTS = ("iteration", "score", "kl", "mismatch", "length", "version", "distinct_bigrams")

Rows = NDArray[np.void]


@dataclass(frozen=True)
class Query:
    """Which samples, and in which order."""

    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Column of `SORTS` -> least and largest value; None: no bound."""
    source: str | None = None
    """The reward source whose score `score` is; None: their weighted sum."""
    text: str = ""
    """What prompt or response contains, whatever its case (of ASCII letters)."""
    prompt: int | None = None
    """Key of the prompt (`index.prompt_key`)."""
    with_tokens: bool = False
    """Only samples whose tokens are recorded."""
    sort: str = "iteration"
    """One of `SORTS`."""
    descending: bool = True


@dataclass(frozen=True)
class Found:
    """A page of samples."""

    rows: Rows
    """Their rows in the index, in order."""
    total: int
    """Number of samples that match, of those looked at."""
    reached: int | None = None
    """The iteration at which a search in the texts ran out of time; None: it saw all."""


class Samples:
    """The recorded samples of a run, also while it runs.

    Raises:
        DataError: by every method, where the run has none, or its folder is gone.
    """

    def __init__(self, stage: Path) -> None:
        """
        Args:
            stage: folder of the stage ppo.
        """
        self._texts, self._index = stage / TEXTS, stage / INDEX

    @property
    def sources(self) -> list[str]:
        """Names of the reward sources."""
        return self._layout()[0]

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._extent()[2]

    def find(self, query: Query, page: int = 0, size: int = 50) -> Found:
        """Return a page of the samples that match.

        Raises:
            DataError: the page lies beyond `MOST_SORTED`, or the source is unknown.
        """
        if query.source is not None and query.source not in self.sources:
            raise DataError(f"no reward source is called {query.source!r}: {self.sources}")
        last = (page + 1) * size
        if query.sort == "iteration":
            return self._in_order(query, last - size, last)
        if last > MOST_SORTED:
            raise DataError(
                f"in the order of {query.sort} the first {MOST_SORTED} samples can be looked "
                "through; narrow the filters"
            )
        return self._sorted(query, last - size, last)

    def at(self, iteration: int, position: int) -> Rows | None:
        """Return the row of a sample; None if it is not recorded."""
        kind, begin, num = self._extent()
        with self._open(self._index) as file:

            def place(number: int) -> tuple[int, int]:
                row = _read_rows(file, kind, begin, number, 1)[0]
                return int(row["iteration"]), int(row["position"])

            found = bisect_left(range(num), (iteration, position), key=place)
            if found == num or place(found) != (iteration, position):
                return None
            return _read_rows(file, kind, begin, found, 1)[0]

    def last(self) -> int:
        """Return the last iteration with samples; 0 if there is none."""
        kind, begin, num = self._extent()
        if not num:
            return 0
        with self._open(self._index) as file:
            return int(_read_rows(file, kind, begin, num - 1, 1)[0]["iteration"])

    def record(self, row: Any) -> dict[str, Any] | None:
        """Return the record of a row; None if its line is torn or damaged."""
        with self._open(self._texts) as file:
            file.seek(int(row["offset"]))
            return record_of(file.read(int(row["size"])).decode(errors="replace"))

    def _in_order(self, query: Query, first: int, last: int) -> Found:
        picked, total = list[Rows](), 0
        reached, deadline = None, time.monotonic() + SEARCH_S
        for rows in self._blocks(query):
            matching = self._matching(rows, query)
            if len(page := matching[max(first - total, 0) : max(last - total, 0)]):
                picked.append(page.copy())
            total += len(matching)
            if query.text and (total >= last or time.monotonic() > deadline):
                reached = int(rows[0 if query.descending else -1]["iteration"])
                break
        return Found(self._joined(picked), total, reached)

    def _sorted(self, query: Query, first: int, last: int) -> Found:
        best, total = self._joined([]), 0
        reached, deadline = None, time.monotonic() + SEARCH_S
        for rows in self._blocks(query):
            matching = self._matching(rows, query)
            total += len(matching)
            both = np.concatenate([best, matching])
            values = self._column(both, query.sort, query.source).astype(np.float64)
            keys = np.where(np.isnan(values), np.inf, -values if query.descending else values)
            best = both[np.argsort(keys, kind="stable")[:last]]
            if query.text and time.monotonic() > deadline:
                reached = int(rows[0 if query.descending else -1]["iteration"])
                break
        return Found(best[first:], total, reached)

    def _joined(self, parts: list[Rows]) -> Rows:
        kind, _, _ = self._extent()
        return np.concatenate(parts) if parts else np.zeros(0, kind)

    def _matching(self, rows: Rows, query: Query) -> Rows:
        """Return those of a block that match, newest first if the query is descending."""
        found = rows[self._matches(rows, query)]
        return found[::-1] if query.descending else found

    def _matches(self, rows: Rows, query: Query) -> NDArray[np.bool_]:
        fits = np.ones(len(rows), dtype=bool)
        for name, (least, most) in query.ranges.items():
            values = self._column(rows, name, query.source)
            if least is not None:
                fits &= values >= least
            if most is not None:
                fits &= values <= most
        if query.prompt is not None:
            fits &= rows["prompt"] == query.prompt
        if query.with_tokens:
            fits &= (rows["flags"] & HAS_TOKENS) > 0
        return self._contain(rows, fits, query.text) if query.text and fits.any() else fits

    def _contain(self, rows: Rows, fits: NDArray[np.bool_], text: str) -> NDArray[np.bool_]:
        """Return which of the rows that fit contain a text; their lines are read as one span."""
        needle = json.dumps(text, ensure_ascii=False)[1:-1].encode(errors="replace").lower()
        begins = rows["offset"].astype(np.int64)
        with self._open(self._texts) as file:
            file.seek(int(begins[0]))
            span = file.read(int(begins[-1] - begins[0]) + int(rows[-1]["size"]))
        lowered, hits = span.lower(), np.zeros(len(rows), dtype=bool)
        at = lowered.find(needle)
        while at >= 0:
            row = int(np.searchsorted(begins - begins[0], at, side="right")) - 1
            begin = int(begins[row] - begins[0])
            end = begin + int(rows[row]["size"])
            if fits[row]:
                record = record_of(span[begin:end].decode(errors="replace")) or {}
                texts = f"{record.get('prompt', '')}\n{record.get('response', '')}"
                hits[row] = text.lower() in texts.lower()
            at = lowered.find(needle, max(end, at + 1))
        return hits

    def _column(self, rows: Rows, name: str, source: str | None) -> NDArray[Any]:
        if name == "score" and source is not None:
            return rows["sources"][:, self.sources.index(source)]
        return rows[name]

    def _blocks(self, query: Query) -> Iterator[Rows]:
        """Yield the rows of the query's iterations in blocks, in its order."""
        kind, begin, num = self._extent()
        size = TEXT_BLOCK if query.text else BLOCK
        least, most = query.ranges.get("iteration", (None, None))
        with self._open(self._index) as file:

            def iteration(number: int) -> int:
                return int(_read_rows(file, kind, begin, number, 1)[0]["iteration"])

            first = 0 if least is None else bisect_left(range(num), least, key=iteration)
            beyond = num if most is None else bisect_right(range(num), most, key=iteration)
            starts = range(first, beyond, size)
            for start in reversed(starts) if query.descending else starts:
                yield _read_rows(file, kind, begin, start, min(size, beyond - start))

    def _layout(self) -> tuple[list[str], int]:
        found = read_header(self._index)
        if found is None:
            raise DataError(
                f"{self._index} does not exist or is no index of samples: the run's ppo has not "
                "begun, is older than this version (its samples can be read once it is resumed), "
                "or its folder was moved or deleted"
            )
        return found

    def _extent(self) -> tuple[np.dtype[np.void], int, int]:
        """Return the type of rows, where they begin, and how many have their texts."""
        sources, begin = self._layout()
        kind = row_type(len(sources))
        try:
            num = (self._index.stat().st_size - begin) // kind.itemsize
            num_bytes = self._texts.stat().st_size if num else 0
        except OSError as error:
            raise _gone(error) from error
        with self._open(self._index) as file:

            def is_missing(number: int) -> bool:
                row = _read_rows(file, kind, begin, number, 1)[0]
                return int(row["offset"]) + int(row["size"]) > num_bytes

            # A kill or a full disk may leave rows whose texts are not there.
            return kind, begin, bisect_left(range(num), True, key=is_missing)

    def _open(self, path: Path) -> Any:
        try:
            return path.open("rb")
        except OSError as error:
            raise _gone(error) from error


def _read_rows(file: Any, kind: np.dtype[np.void], begin: int, first: int, num: int) -> Rows:
    file.seek(begin + first * kind.itemsize)
    content = file.read(num * kind.itemsize)
    if len(content) < num * kind.itemsize:
        raise DataError("the run was resumed while its samples were read; load the page again")
    return np.frombuffer(content, kind)


def _gone(error: OSError) -> DataError:
    return DataError(
        f"{error.filename} cannot be read ({error.strerror}): the run's folder was moved or deleted"
    )
