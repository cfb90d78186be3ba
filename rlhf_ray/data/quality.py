"""What the texts of a data set are like, counted as they go by."""

import hashlib
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

LENGTH_BOUNDS = (0, *(2**power for power in range(5, 15)))
"""Lower bounds of the length bins, characters; the last one has no upper bound."""

NO_LANGUAGE = "not named"
MAX_LANGUAGES = 12

_FENCE = re.compile(r"^```([^`\n]*)\n.*?^```[ \t]*$", re.MULTILINE | re.DOTALL)
_BUFFER = 65536
_PARTS = 16


class Texts:
    """Counts of one kind of text; memory does not grow with their number.

    Use as a context manager: its scratch file, 8 bytes a text, is removed at the end.
    """

    def __init__(self) -> None:
        self._lengths = [0] * len(LENGTH_BOUNDS)
        self._languages: Counter[str] = Counter()
        self._digests = array("Q")
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (closed by __exit__)

    def __enter__(self) -> "Texts":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, text: str) -> None:
        """Count a text."""
        self._lengths[int(np.searchsorted(LENGTH_BOUNDS, len(text), side="right")) - 1] += 1
        for language in _FENCE.findall(text):
            self._languages[language.strip().lower() or NO_LANGUAGE] += 1
        words = " ".join(text.lower().split())
        digest = hashlib.blake2b(words.encode(), digest_size=8).digest()
        self._digests.frombytes(digest)
        if len(self._digests) >= _BUFFER:
            self._flush()

    def report(self) -> dict[str, Any]:
        """Plain values for quality.json.

        ``texts``; ``repeated``: texts that another one before them equals, case and white space
        aside; ``length_bounds`` (characters) and ``lengths``; ``languages`` of code fences.
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
        """Distinct digests, a part at a time: sorting all of them would take twice their memory."""
        self._flush()
        self._file.flush()
        if not self._file.tell():
            return 0
        digests = np.memmap(self._file, np.uint64, mode="r")
        part = digests % np.uint64(_PARTS)
        return sum(len(np.unique(digests[part == index])) for index in range(_PARTS))


def _largest(counts: Counter[str], most: int) -> dict[str, int]:
    """The most frequent ones; the rest together as ``other``."""
    largest: Sequence[tuple[str, int]] = counts.most_common(most)
    rest = counts.total() - sum(num for _, num in largest)
    return dict(largest) | ({"other": rest} if rest else {})
