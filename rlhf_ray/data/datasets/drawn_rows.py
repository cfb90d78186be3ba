"""Rows of a large set: drawn first, by number, and read as far as they are used."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.draws import (
    is_drawn_group,
    prompt_group,
    share_of_sample,
    share_of_stored,
)
from rlhf_ray.data.reading.rows import Row, StoredRows, unpack_row
from rlhf_ray.data.reading.tables import rows_of

LARGE = 10_000
"""Rows above which a set is read as it is used; reading fewer takes seconds."""

BLOCK = 1000
"""Rows that are read together."""

HELD_OUT_PART = 20
"""Of the prompts of a set, one of so many is held out, with all of its rows."""

FEW_PROMPTS = 200
"""Fewer different prompts than this among the first `LARGE` rows drawn: each row is held out, or
not, by itself."""


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
        self._seed = seed
        self._share = share_of_stored(rows, max_bad_share)
        self._tally = RowTally(name, max_bad_share)
        self.order = np.random.default_rng([seed, 0]).permutation(len(rows.table))
        """[N] row numbers."""
        self.counts: dict[str, int] = {}
        """Counts of the rows read so far, and how many were not (``unread``)."""

    def select(self, numbers: list[int]) -> list[Row]:
        """Return rows by their numbers."""
        columns: Any = self._rows.table[numbers]  # datasets types it as a dict or a list
        return list(rows_of(columns))

    def part(self, held_out: bool) -> Iterator[list[tuple[int, Row]]]:
        """Yield (number, row) of the rows to train on, or those held out, in blocks.

        Blocks are read when they are taken; some may be empty.
        """
        for start in range(0, len(self.order), BLOCK):
            numbers = self.order[start : start + BLOCK].tolist()
            rows = zip(numbers, self.select(numbers), strict=True)
            yield [(n, row) for n, row in rows if self._is_held_out(n, row) == held_out]

    def _is_held_out(self, number: int, row: Row) -> bool:
        group = number if self._few_prompts else prompt_group(unpack_row(row))
        return is_drawn_group(group, HELD_OUT_PART, self._seed)

    @cached_property
    def _few_prompts(self) -> bool:
        first = self.select(self.order[:LARGE].tolist())
        return len({prompt_group(unpack_row(row)) for row in first}) < FEW_PROMPTS

    def count(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Count rows that were read, none twice, by the state of their `RowTally`.

        Raises:
            DataError: too many of the rows read so far are bad; or none of all can be used.
        """
        self._tally.add(state)
        num_read = self._tally.num_rows
        num_unread = len(self.order) - num_read
        share = share_of_sample(self._share, num_read) if num_unread else self._share
        self._tally.max_bad_share = share  # the reader's skipped rows are in this share already
        counts = self._tally.finish(is_part=num_unread > 0)
        self.counts.update(counts)
        for skipped in self._rows.skipped:
            self.counts[skipped.reason] = counts.get(skipped.reason, 0) + skipped.num
        self.counts["unread"] = num_unread
