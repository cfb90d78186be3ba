"""Statistics of a dataset's texts (lengths, duplicates, languages, scores), in one pass."""

import hashlib
import re
import tempfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from rlhf_ray.data.reading.rows import Row
from rlhf_ray.disk import large_files_folder

LENGTH_BOUNDS = (0, *(2**power for power in range(5, 15)))
"""Lower bounds of the length bins, in characters; the last bin has no upper bound."""

NO_LANGUAGE = "not named"
MAX_LANGUAGES = 12
"""Languages that are counted apart in a report; the rest are ``other``."""

_KINDS = {
    "prompts": ("prompt", "messages"),
    "answers": ("completion", "chosen", "rejected"),
    "texts": ("text",),
}
"""Kind of text -> the columns of a row that hold it."""

_FENCE = re.compile(r"^```([^`\n]*)\n.*?^```[ \t]*$", re.MULTILINE | re.DOTALL)
_BUFFER = 65536
"""Digests held in memory before they are written to the scratch file."""
_PARTS = 16


class TextStats:
    """Statistics of one kind of text; memory does not grow with the number of texts.

    A context manager: its scratch file, 8 bytes a text, is removed at the end.
    """

    def __init__(self) -> None:
        self._lengths = [0] * len(LENGTH_BOUNDS)
        self._languages: Counter[str] = Counter()
        self._digests = array("Q")
        self._file = tempfile.TemporaryFile(dir=large_files_folder())  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> "TextStats":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, text: str) -> None:
        """Count a text."""
        self._lengths[bisect_right(LENGTH_BOUNDS, len(text)) - 1] += 1
        for language in _FENCE.findall(text) if "```" in text else ():
            self._languages[language.strip().lower() or NO_LANGUAGE] += 1
        words = " ".join(text.lower().split())
        digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
        self._digests.frombytes(digest)
        if len(self._digests) >= _BUFFER:
            self._flush()

    def state(self) -> tuple[dict[str, Any], np.ndarray]:
        """Return plain counts, and a 64-bit digest of each text, for statistics that `add_all`."""
        self._flush()
        self._file.seek(0)
        digests = np.frombuffer(self._file.read(), np.uint64)
        return {"lengths": self._lengths, "languages": dict(self._languages)}, digests

    def add_all(self, counts: Mapping[str, Any], digests: np.ndarray) -> None:
        """Add the texts of other statistics, as their `state` returned them."""
        self._lengths = [
            mine + more for mine, more in zip(self._lengths, counts["lengths"], strict=True)
        ]
        self._languages.update(counts["languages"])
        self._digests.frombytes(digests.tobytes())
        self._flush()

    def report(self) -> dict[str, object]:
        """Return plain values for quality.json.

        ``texts``; ``repeated``: texts that equal an earlier one but for case and white space;
        ``length_bounds`` (characters) and ``lengths``; ``languages`` of code fences.
        """
        num_texts = sum(self._lengths)
        return {
            "texts": num_texts,
            "repeated": num_texts - self._num_distinct(),
            "length_bounds": list(LENGTH_BOUNDS),
            "lengths": self._lengths,
            "languages": _largest(self._languages, MAX_LANGUAGES),
        }

    def _flush(self) -> None:
        self._digests.tofile(self._file)
        self._digests = array("Q")

    def _num_distinct(self) -> int:
        """Count distinct digests, a part at a time: sorting all would take twice their memory."""
        self._flush()
        self._file.flush()
        if not self._file.tell():
            return 0
        digests = np.memmap(self._file, np.uint64, mode="r")
        part = digests % np.uint64(_PARTS)
        return sum(len(np.unique(digests[part == index])) for index in range(_PARTS))


class RowStats:
    """Statistics of the texts of rows, by kind; a context manager like `TextStats`."""

    def __init__(self) -> None:
        self._files = ExitStack()
        self._texts: dict[str, TextStats] = {}
        self._scores: Counter[int] = Counter()

    def __enter__(self) -> "RowStats":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, row: Row) -> None:
        """Count the texts and the ``score`` of a row."""
        for kind, columns in _KINDS.items():
            for text in _texts_of(row, columns):
                if kind not in self._texts:
                    self._texts[kind] = self._files.enter_context(TextStats())
                self._texts[kind].add(text)
        score = row.get("score")
        if isinstance(score, int | float):
            self._scores[round(score)] += 1

    def report(self) -> dict[str, object]:
        """Return plain values for JSON: a `TextStats.report` a kind, and the rounded ``scores``."""
        kinds = {kind: texts.report() for kind, texts in self._texts.items()}
        return {**kinds, "scores": histogram(self._scores)}


def histogram(scores: Mapping[int, int]) -> dict[str, int]:
    """Return the counts of scores, from the lowest to the highest."""
    return {str(score): num for score, num in sorted(scores.items())}


def _texts_of(row: Row, columns: Sequence[str]) -> Iterator[str]:
    for column in columns:
        value = row.get(column)
        if column == "messages" and isinstance(value, list | tuple) and value:
            yield "\n\n".join(str(message["content"]) for message in value)
        elif isinstance(value, str) and value:
            yield value


def _largest(counts: Counter[str], most: int) -> dict[str, int]:
    """Return the most frequent ones; the rest together as ``other``."""
    largest: Sequence[tuple[str, int]] = counts.most_common(most)
    rest = counts.total() - sum(num for _, num in largest)
    return dict(largest) | ({"other": rest} if rest else {})
