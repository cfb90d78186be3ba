"""Texts of a large set: drawn first, by number, and tokenised as far as they are used."""

from collections.abc import Iterator

from rlhf_ray.data.datasets.drawn_rows import DrawnRows
from rlhf_ray.data.datasets.texts import TextRendering, render_documents
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.rows import StoredRows
from rlhf_ray.data.reading.tables import TokenRow


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
        for block in self._drawn.part(held_out):
            numbers, rows = zip(*block, strict=True) if block else ((), ())
            tally = RowTally(self._name, 1.0)
            texts = list(render_documents(rows, self._rendering, tally, numbers))
            self._drawn.count(len(rows), tally.state())
            yield from texts
