"""Rows of a large set: drawn first, by number, and read as far as they are used."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.draws import share_of_sample, share_of_stored
from rlhf_ray.data.reading.rows import StoredRows

LARGE = 10_000
"""Rows above which a set is read as it is used; reading fewer takes seconds."""

BLOCK = 1000
"""Rows that are read together."""


class DrawnRows:
    """The rows of a set in the order of a draw, and the counts of those that were read.

    Args:
        rows: the set.
        seed: of the draw.
        max_bad_share: share of bad rows above which reading stops, with a margin while only a part
            has been read.
        name: the set, for messages.
    """

    def __init__(self, rows: StoredRows, seed: int, max_bad_share: float, name: str) -> None:
        self._rows = rows
        self._share = share_of_stored(rows, max_bad_share)
        self._tally = RowTally(name, max_bad_share)
        self._num_read = 0
        self.order = np.random.default_rng([seed, 0]).permutation(len(rows.table))
        """[N] row numbers."""
        self.counts: dict[str, int] = {}
        """Counts of the rows read so far, and how many were not (``unread``)."""

    def select(self, numbers: list[int]) -> Any:  # datasets types a row as a dict or a list
        """Return rows by their numbers."""
        return self._rows.table.select(numbers)

    def count(self, num_rows: int, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Count rows that were read, none twice.

        Args:
            num_rows: how many.
            state: of their `RowTally`.

        Raises:
            DataError: too many of the rows read so far are bad; or none of all can be used.
        """
        self._num_read += num_rows
        self._tally.add(state)
        num_unread = len(self.order) - self._num_read
        share = share_of_sample(self._share, self._num_read) if num_unread else self._share
        self._tally.max_bad_share = share  # the reader's skipped rows are in this share already
        counts = self._tally.finish(is_part=num_unread > 0)
        self.counts.update(counts)
        for skipped in self._rows.skipped:
            self.counts[skipped.reason] = counts.get(skipped.reason, 0) + skipped.num
        self.counts["unread"] = num_unread
