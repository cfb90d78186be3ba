"""What is drawn of a dataset: the rows held out, and a sample that is tried before the whole."""

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rlhf_ray.data.reading.counts import SkippedRows
from rlhf_ray.data.reading.rows import Row, StoredRows

SAMPLE = 500
"""Rows that are tried first, of a dataset with at least four times as many."""


def split_groups(
    groups: Sequence[object], num_held_out: int, seed: int
) -> tuple[list[int], list[int]]:
    """Draw the rows that are held out; rows of one group stay together.

    So no prompt is held out that is trained on as well. A dataset is sorted by time more often than
    not, so neither end of it is like the whole. Each group has its own place in the draw, whatever
    the others are: a run that is resumed with more or fewer rows holds the same ones out, as far as
    the number allows.

    Args:
        groups: group of each row, such as its prompt, spelt the same on every machine. Where all
            are larger than what is held out, rows are drawn alone.
        num_held_out: number of rows to hold out; there may be fewer where no group fits the rest.
        seed: of the draw.

    Returns:
        Rows to train on in their order, and held-out rows in the order of the draw.

    Example:
        >>> split_groups("aabcd", 2, seed=0)
        ([0, 1, 4], [2, 3])
    """
    sizes: Counter[object] = Counter(groups)
    if min(sizes.values(), default=0) > num_held_out or len(sizes) == 1:
        groups = list[object](range(len(groups)))
        sizes = Counter(groups)
    order = sorted(sizes, key=lambda group: text_group(f"rows:{seed}:{group}"))
    drawn: dict[object, int] = {}
    room = num_held_out
    for group in order:
        if sizes[group] <= room:
            drawn[group] = len(drawn)
            room -= sizes[group]
    rows = range(len(groups))
    held_out = [row for row in rows if groups[row] in drawn]
    held_out.sort(key=lambda row: drawn[groups[row]])
    return [row for row in rows if groups[row] not in drawn], held_out


def prompt_group(row: Row) -> int:
    """Return a number that rows of one prompt share, or of one text: the same on every machine."""
    given = [row.get(name) for name in ("messages", "prompt", "tools")]
    return text_group(json.dumps(given if any(given) else row.get("text"), default=str))


def text_group(text: str) -> int:
    """Return a number that stands for a text, the same on every machine."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def is_drawn_group(group: object, one_of: int, seed: int) -> bool:
    """Return whether a group is among one of so many, whatever the others are."""
    return text_group(f"rows:{seed}:{group}") % one_of == 0


def share_of_sample(share: float, num: int) -> float:
    """Return the share that a sample of ``num`` rows may have: four standard errors more."""
    return share + 4 * math.sqrt(share * (1 - share) / max(num, 1))


def try_sample(
    rows: Iterable[Row | SkippedRows],
    load: Callable[..., object],
    max_bad_share: float,
    name: str,
) -> None:
    """Load a sample: what will fail is then found before all rows have been tokenised.

    Args:
        rows: of the whole dataset; nothing is tried where they are few.
        load: a loader, called with rows, ``max_bad_share`` and ``name``.
        max_bad_share: of the whole; the sample's is `share_of_sample`.
        name: the dataset, for messages.

    Raises:
        DataError: too many rows of the sample are bad, or all are of no use.
    """
    if not isinstance(rows, StoredRows) or len(rows.table) < 4 * SAMPLE:
        return
    drawn = sorted(random.Random(name).sample(range(len(rows.table)), SAMPLE))
    load(
        StoredRows(rows.table.select(drawn)),
        max_bad_share=share_of_sample(share_of_stored(rows, max_bad_share), SAMPLE),
        name=f"a sample of {SAMPLE} rows of {name}",
    )


def share_of_stored(rows: StoredRows, max_bad_share: float) -> float:
    """Return the share of stored rows that may be bad, given those that their reader skipped."""
    num_rows = len(rows.table) + rows.num_unread
    num_skipped_bad = sum(skipped.num for skipped in rows.skipped if skipped.is_bad)
    num_all = num_rows + sum(skipped.num for skipped in rows.skipped)
    return min(1.0, max(0.0, (max_bad_share * num_all - num_skipped_bad) / num_rows))
