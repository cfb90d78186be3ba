"""Texts joined end to end and cut into blocks of one length: no padding, no wasted compute."""

from collections.abc import Iterable, Sequence


def pack(
    token_lists: Iterable[Sequence[int]], block_size: int, eos_id: int | None = None
) -> list[list[int]]:
    """Concatenate texts, each with its end, and cut the run into equal blocks.

    The end is what teaches a model to stop. A remainder shorter than a block is dropped.

    Args:
        token_lists: token ids of each text.
        block_size: tokens of a block.
        eos_id: added after each text; None: the texts bring their ends.

    Returns:
        Blocks of exactly ``block_size`` ids.

    Example:
        >>> pack([[1, 2, 3], [4, 5]], block_size=3, eos_id=0)
        [[1, 2, 3], [0, 4, 5]]
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    blocks: list[list[int]] = []
    open_block: list[int] = []
    for tokens in token_lists:
        open_block.extend(tokens)
        if eos_id is not None:
            open_block.append(eos_id)
        num_whole = len(open_block) // block_size * block_size
        blocks.extend(open_block[i : i + block_size] for i in range(0, num_whole, block_size))
        open_block = open_block[num_whole:]
    return blocks
