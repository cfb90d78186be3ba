"""Prompts of a large set: drawn first, by number, and rendered as far as they are used."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np

from rlhf_ray.data.datasets import drawn_rows
from rlhf_ray.data.datasets.drawn_rows import DrawnRows
from rlhf_ray.data.datasets.prompts import (
    PROMPT_COLUMNS,
    PromptRendering,
    Prompts,
    Seen,
    render_prompts,
)
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.draws import is_drawn_group, text_group
from rlhf_ray.data.reading.rows import StoredRows
from rlhf_ray.data.reading.tables import cached_table, write_table
from rlhf_ray.types import Prompt

HELD_OUT_PART = 10
"""One of so many prompts is held out where a set is split."""


_thread = ThreadPoolExecutor(1, "prompts")
"""Renders blocks before they are taken: half a second each would stop the loop that takes them."""


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
        self._drawn = DrawnRows(rows, seed, max_bad_share, name)
        self._rendering = rendering
        self._name = name
        self._part = part
        self._store = store
        self._blocks: list[Prompts] = []
        self._ends = [0]
        self._seen: Seen = {}
        self._ahead: Future[tuple[datasets.Dataset, dict[str, Any]]] | None = None
        self.counts = self._drawn.counts
        """Counts of the rows read so far, and how many were not (``unread``)."""

    @property
    def _num_read(self) -> int:
        return min(len(self._blocks) * drawn_rows.BLOCK, len(self._drawn.order))

    def reach(self, num: int) -> int:
        """Render until there are ``num`` prompts; return how many there are, less at the end."""
        while self._ends[-1] < num and self._num_read < len(self._drawn.order):
            self._read_block()
        return self._ends[-1]

    def render_ahead(self, num: int) -> None:
        """Begin to render the next block, in a thread, where ``num`` prompts need more."""
        if self._ahead is None and self._ends[-1] < num and self._num_read < len(self._drawn.order):
            self._ahead = _thread.submit(copy_context().run, self._load, self._num_read)

    def __len__(self) -> int:
        """Return the number of prompts; an estimate until all rows have been read."""
        self.reach(1)
        return round(self._ends[-1] * len(self._drawn.order) / max(self._num_read, 1))

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            stop = len(self._drawn.order) if index.stop is None else index.stop
            return [self[number] for number in range(*index.indices(self.reach(stop)))]
        if not 0 <= index < self.reach(index + 1):
            raise IndexError(f"{self._name}: no prompt {index}")
        block = int(np.searchsorted(self._ends, index, side="right")) - 1
        return self._blocks[block][index - self._ends[block]]

    def sample(self, num: int, _seed: int) -> list[Prompt]:
        """Return at most ``num`` prompts, drawn already; a smaller sample is part of a larger."""
        return [self[number] for number in range(min(num, self.reach(num)))]

    def _read_block(self) -> None:
        ahead, self._ahead = self._ahead, None
        table, counts = ahead.result() if ahead else self._load(self._num_read)
        for row_id, group in zip(table["row_id"], table["group"], strict=True):
            if row_id:
                self._seen.setdefault(row_id, set()).add(group)
        if self._part is not None:
            texts = enumerate(table["text"])
            table = table.select([index for index, text in texts if self._part(text)])
        self._blocks.append(Prompts(table))
        self._ends.append(self._ends[-1] + len(table))
        self._drawn.count(counts)

    def _load(self, start: int) -> tuple[datasets.Dataset, dict[str, Any]]:
        if self._store is None:
            return self._render(start)
        return cached_table(self._store / str(start), lambda: self._render(start))

    def _render(self, start: int) -> tuple[datasets.Dataset, dict[str, Any]]:
        numbers = self._drawn.order[start : start + drawn_rows.BLOCK].tolist()
        tally = RowTally(self._name, 1.0)
        rows = self._drawn.select(numbers)
        prompts = render_prompts(rows, self._rendering, tally, self._seen, numbers)
        return write_table(prompts, PROMPT_COLUMNS), tally.state()


def is_held_out(text: str, seed: int) -> bool:
    """Return whether a prompt is held out: a function of its text and the seed alone."""
    return is_drawn_group(text_group(text), HELD_OUT_PART, seed)
