"""Prompts of a large set: drawn first, by number, and rendered as far as they are used."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np

from rlhf_ray.data.datasets.prompts import (
    PROMPT_COLUMNS,
    PromptRendering,
    Prompts,
    Seen,
    render_prompts,
)
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.draws import share_of_sample, share_of_stored, text_group
from rlhf_ray.data.reading.rows import StoredRows
from rlhf_ray.data.reading.tables import cached_table, write_table
from rlhf_ray.types import Prompt

LARGE = 10_000
"""Rows above which a set is rendered as it is used; rendering fewer takes seconds."""

BLOCK = 1000
"""Rows that are rendered together."""

HELD_OUT_PART = 10
"""One of so many prompts is held out where a set is split."""


class DrawnPrompts(Sequence[Prompt]):
    """The usable prompts of a set in the order of a draw, rendered block by block when indexed.

    Args:
        rows: the set.
        rendering: how a row becomes a prompt.
        seed: of the draw.
        max_bad_share: share of bad rows above which reading stops, with a margin while only a part
            has been read.
        name: the set, for messages.
        part: true for the texts of prompts that belong to this part of the set; None: all do.
        store: folder in which rendered blocks are kept for a resume; None: they are not.

    Raises:
        DataError: when indexed: too many rows are bad, or an over-long one with
            ``overlong="error"``.
    """

    def __init__(
        self,
        rows: StoredRows,
        rendering: PromptRendering,
        seed: int,
        max_bad_share: float,
        name: str,
        part: Callable[[str], bool] | None = None,
        store: Path | None = None,
    ) -> None:
        self._rows = rows
        self._rendering = rendering
        self._max_bad_share = max_bad_share
        self._name = name
        self._part = part
        self._store = store
        self._order = np.random.default_rng([seed, 0]).permutation(len(rows.table))
        self._blocks: list[Prompts] = []
        self._ends = [0]
        self._seen: Seen = {}
        self._tally = RowTally(name, max_bad_share)
        self.counts: dict[str, int] = {}
        """Counts of the rows read so far, and how many were not (``unread``)."""

    @property
    def _num_read(self) -> int:
        return min(len(self._blocks) * BLOCK, len(self._order))

    def reach(self, num: int) -> int:
        """Render until there are ``num`` prompts; return how many there are, less at the end."""
        while self._ends[-1] < num and self._num_read < len(self._order):
            self._read_block()
        return self._ends[-1]

    def __len__(self) -> int:
        """Return the number of prompts; an estimate until all rows have been read."""
        self.reach(1)
        return round(self._ends[-1] * len(self._order) / max(self._num_read, 1))

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            stop = len(self._order) if index.stop is None else index.stop
            return [self[number] for number in range(*index.indices(self.reach(stop)))]
        if not 0 <= index < self.reach(index + 1):
            raise IndexError(f"{self._name}: no prompt {index}")
        block = int(np.searchsorted(self._ends, index, side="right")) - 1
        return self._blocks[block][index - self._ends[block]]

    def sample(self, num: int, _seed: int) -> list[Prompt]:
        """Return at most ``num`` prompts, drawn already; a smaller sample is part of a larger."""
        return [self[number] for number in range(min(num, self.reach(num)))]

    def _read_block(self) -> None:
        start = self._num_read
        if self._store is None:
            table, counts = self._render(start)
        else:
            table, counts = cached_table(self._store / str(start), lambda: self._render(start))
        for row_id, group in zip(table["row_id"], table["group"], strict=True):
            if row_id:
                self._seen.setdefault(row_id, set()).add(group)
        if self._part is not None:
            texts = enumerate(table["text"])
            table = table.select([index for index, text in texts if self._part(text)])
        self._blocks.append(Prompts(table))
        self._ends.append(self._ends[-1] + len(table))
        self._tally.add(counts)
        self._count()

    def _render(self, start: int) -> tuple[datasets.Dataset, dict[str, Any]]:
        numbers = self._order[start : start + BLOCK].tolist()
        tally = RowTally(self._name, self._max_bad_share)
        rows: Any = self._rows.table.select(numbers)  # datasets types a row as a dict or a list
        prompts = render_prompts(rows, self._rendering, tally, self._seen, numbers)
        return write_table(prompts, PROMPT_COLUMNS), tally.state()

    def _count(self) -> None:
        """Count the rows read so far.

        Raises:
            DataError: too many of them are bad.
        """
        num_unread = len(self._order) - self._num_read
        share = share_of_stored(self._rows, self._max_bad_share)
        # The reader's skipped rows are in this share already.
        self._tally.max_bad_share = share_of_sample(share, self._num_read) if num_unread else share
        counts: Mapping[str, int] = self._tally.finish()
        self.counts.update(counts)
        for skipped in self._rows.skipped:
            self.counts[skipped.reason] = counts.get(skipped.reason, 0) + skipped.num
        self.counts["unread"] = num_unread
        if not num_unread:
            del self.counts["unread"]


def is_held_out(text: str, seed: int) -> bool:
    """Return whether a prompt is held out: a function of its text and the seed alone."""
    return text_group(f"rows:{seed}:{text_group(text)}") % HELD_OUT_PART == 0
