"""Texts of a large set: drawn first, by number, and tokenised as far as they are used."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from rlhf_ray.data.datasets.drawn_rows import DrawnRows
from rlhf_ray.data.datasets.texts import TextRendering, render_documents
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.rows import Row, StoredRows
from rlhf_ray.data.reading.tables import TokenRow

Block = Sequence[tuple[int, Row]]
"""(number, row) of the rows that are tokenised together."""

Tokenised = tuple[list[TokenRow], dict[str, dict[str, Any]]]
"""The texts of a block, and the state of the `RowTally` of its rows."""

Tokenise = Callable[[tuple[TextRendering, str], Block], Tokenised]
"""Tokenises a block, given the rendering and the set's name."""

BlockMap = Callable[[Tokenise, tuple[TextRendering, str], Iterable[Block]], Iterator[Tokenised]]
"""Yields what a function returns for each block, in order, and takes blocks as it needs them."""


def one_by_one(
    function: Tokenise, given: tuple[TextRendering, str], blocks: Iterable[Block]
) -> Iterator[Tokenised]:
    """Tokenise one block after the other, in this process."""
    return (function(given, block) for block in blocks)


class DrawnTexts:
    """The usable texts of a set in the order of a draw, tokenised block by block.

    Args:
        rows: the set.
        rendering: how a row becomes a text.
        seed: of the draw.
        max_bad_share: as in `DrawnRows`.
        name: the set, for messages.
        map_blocks: how blocks are tokenised; the result is the same.
    """

    def __init__(
        self,
        rows: StoredRows,
        rendering: TextRendering,
        seed: int,
        max_bad_share: float,
        name: str,
        map_blocks: BlockMap = one_by_one,
    ) -> None:
        self._drawn = DrawnRows(rows, seed, max_bad_share, name)
        self._rendering = rendering
        self._name = name
        self._map = map_blocks
        self.counts = self._drawn.counts
        """Counts of the rows read so far, and how many were not (``unread``)."""

    def documents(self, held_out: bool) -> Iterator[TokenRow]:
        """Yield the texts to train on, or those held out, as `render_documents` does.

        Rows are read in blocks, the next when all texts of one have been taken.

        Raises:
            DataError: too many of the rows read so far are bad, or a text is over-long with
                ``overlong="error"``.
        """
        given = self._rendering, self._name
        for texts, counts in self._map(_tokenise, given, self._drawn.part(held_out)):
            self._drawn.count(counts)
            yield from texts


def _tokenise(given: tuple[TextRendering, str], block: Block) -> Tokenised:
    rendering, name = given
    numbers, rows = zip(*block, strict=True) if block else ((), ())
    tally = RowTally(name, 1.0)
    return list(render_documents(rows, rendering, tally, numbers)), tally.state()
