"""Packing of texts into blocks of one length."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

IGNORED = -100
"""Label of a token without a loss, by the convention of transformers' losses."""

MAX_OPEN_BLOCKS = 64
"""Blocks that are filled at the same time: more of them need less padding and more memory."""


@dataclass
class Block:
    """One row of a batch.

    Attributes:
        input_ids: [S] token ids.
        labels: [S] the same ids, `IGNORED` on tokens without a loss.
        position_ids: [S] positions within each text. A position that does not follow its
            predecessor begins a new text: most transformers models then mask attention between
            texts (if no attention mask is passed), for others `models.isolation` does.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)

    def add(self, token_ids: Sequence[int], learnt: Sequence[int]) -> None:
        """Append a text; its first token has no loss, since nothing of the text predicts it."""
        self.input_ids += token_ids
        self.labels += [IGNORED, *labels_of(token_ids[1:], learnt[1:])]
        self.position_ids += range(len(token_ids))


def pack(
    token_lists: Iterable[Sequence[int]], block_size: int, eos_id: int | None = None
) -> list[list[int]]:
    """Concatenate texts, each with its end token, and cut them into equal blocks.

    The end token teaches a model to stop. A remainder shorter than a block is dropped.

    Args:
        token_lists: token ids of each text.
        block_size: tokens of a block.
        eos_id: added after each text; None: the texts have their end tokens.

    Returns:
        Blocks of exactly ``block_size`` ids.

    Example:
        >>> pack([[1, 2, 3], [4, 5]], block_size=3, eos_id=0)
        [[1, 2, 3], [0, 4, 5]]
    """
    ends = [] if eos_id is None else [eos_id]
    return list(_cut(((*tokens, *ends) for tokens in token_lists), block_size))


def concatenated(
    documents: Iterable[tuple[Sequence[int], Sequence[int]]], block_size: int
) -> Iterator[Block]:
    """Yield blocks of concatenated texts, as `pack`.

    A text may continue in the next block, and attention reaches from one text into the next.

    Args:
        documents: token ids of each text, end token included, and 1 on those with a loss.
        block_size: tokens of a block.
    """
    pairs = (list(zip(*document, strict=True)) for document in documents)
    for run in _cut(pairs, block_size):
        token_ids, learnt = zip(*run, strict=True)
        yield Block(list(token_ids), labels_of(token_ids, learnt), list(range(block_size)))


def isolated(
    documents: Iterable[tuple[Sequence[int], Sequence[int]]], block_size: int, pad_id: int
) -> Iterator[Block]:
    """Yield blocks of whole texts that do not attend to each other, padded at the end.

    Each text goes into the fullest block that it fits in. A text longer than a block is cut into
    pieces, which do not attend to each other either.
    """
    blocks: list[Block] = []
    for token_ids, learnt in _pieces(documents, block_size):
        size = len(token_ids)
        fitting = [block for block in blocks if len(block.input_ids) + size <= block_size]
        block = max(fitting, key=lambda block: len(block.input_ids), default=None)
        if block is None:
            block = Block()
            blocks.append(block)
        block.add(token_ids, learnt)
        if len(blocks) > MAX_OPEN_BLOCKS:
            fullest = max(blocks, key=lambda block: len(block.input_ids))
            blocks.remove(fullest)
            yield padded(fullest, block_size, pad_id)
    yield from (padded(block, block_size, pad_id) for block in blocks)


def unpacked(
    documents: Iterable[tuple[Sequence[int], Sequence[int]]], block_size: int
) -> Iterator[Block]:
    """Yield a block for each text, of its length; texts over ``block_size`` are cut into pieces."""
    for token_ids, learnt in _pieces(documents, block_size):
        block = Block()
        block.add(token_ids, learnt)
        yield block


def padded(block: Block, size: int, pad_id: int) -> Block:
    """Fill a block up to ``size`` tokens with a text of its own without a loss; returns it."""
    missing = size - len(block.input_ids)
    if missing:
        block.add([pad_id] * missing, [0] * missing)
    return block


def labels_of(token_ids: Sequence[int], learnt: Sequence[int]) -> list[int]:
    """Return the ids of tokens with a loss, `IGNORED` elsewhere."""
    pairs = zip(token_ids, learnt, strict=True)
    return [token_id if is_learnt else IGNORED for token_id, is_learnt in pairs]


def _pieces(
    documents: Iterable[tuple[Sequence[int], Sequence[int]]], size: int
) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """Yield the texts, longer ones cut into pieces of at most ``size`` tokens."""
    for token_ids, learnt in documents:
        for start in range(0, len(token_ids), size):
            piece = slice(start, start + size)
            yield token_ids[piece], learnt[piece]


def _cut(runs: Iterable[Sequence[T]], block_size: int) -> Iterator[list[T]]:
    """Join runs end to end and yield whole blocks."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    open_block: list[T] = []
    for run in runs:
        open_block.extend(run)
        num_whole = len(open_block) // block_size * block_size
        for start in range(0, num_whole, block_size):
            yield open_block[start : start + block_size]
        open_block = open_block[num_whole:]
