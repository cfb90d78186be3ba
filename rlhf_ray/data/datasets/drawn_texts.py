"""Texts of a large set: drawn first, by number, and tokenised as far as they are used."""

from collections.abc import Iterator
from functools import cached_property

from rlhf_ray.data.datasets import drawn_rows
from rlhf_ray.data.datasets.drawn_rows import DrawnRows
from rlhf_ray.data.datasets.texts import TextRendering, render_documents
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.draws import is_drawn_group, prompt_group
from rlhf_ray.data.reading.rows import Row, StoredRows, unpack_row
from rlhf_ray.data.reading.tables import TokenRow

HELD_OUT_PART = 20
"""Of the prompts of a set, one of so many is held out, with all of its texts."""

FEW_PROMPTS = 200
"""Fewer different prompts than this among the first `LARGE` rows drawn: each row is held out, or
not, by itself."""


class DrawnTexts:
    """The usable texts of a set in the order of a draw, tokenised block by block.

    Args:
        rows: the set.
        rendering: how a row becomes a text.
        seed: of the draw.
        max_bad_share: as in `DrawnRows`.
        name: the set, for messages.
    """

    def __init__(
        self,
        rows: StoredRows,
        rendering: TextRendering,
        seed: int,
        max_bad_share: float,
        name: str,
    ) -> None:
        self._drawn = DrawnRows(rows, seed, max_bad_share, name)
        self._rendering = rendering
        self._seed = seed
        self._name = name
        self.counts = self._drawn.counts
        """Counts of the rows read so far, and how many were not (``unread``)."""

    def documents(self, held_out: bool) -> Iterator[TokenRow]:
        """Yield the texts to train on, or those held out, as `render_documents` does.

        Rows are read in blocks, the next when all texts of one have been taken.

        Raises:
            DataError: too many of the rows read so far are bad, or a text is over-long with
                ``overlong="error"``.
        """
        for start in range(0, len(self._drawn.order), drawn_rows.BLOCK):
            block = self._drawn.order[start : start + drawn_rows.BLOCK].tolist()
            pairs = zip(block, self._drawn.select(block), strict=True)
            chosen = [(n, row) for n, row in pairs if self._is_held_out(n, row) == held_out]
            numbers, rows = zip(*chosen, strict=True) if chosen else ((), ())
            tally = RowTally(self._name, 1.0)
            texts = list(render_documents(rows, self._rendering, tally, numbers))
            self._drawn.count(len(rows), tally.state())
            yield from texts

    def _is_held_out(self, number: int, row: Row) -> bool:
        group = number if self._few_prompts else prompt_group(unpack_row(row))
        return is_drawn_group(group, HELD_OUT_PART, self._seed)

    @cached_property
    def _few_prompts(self) -> bool:
        first = self._drawn.order[: drawn_rows.LARGE].tolist()
        groups = {prompt_group(unpack_row(row)) for row in self._drawn.select(first)}
        return len(groups) < FEW_PROMPTS
