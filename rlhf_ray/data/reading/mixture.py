"""Several data sets as one."""

from collections.abc import Sequence

import numpy as np


def interleave(sizes: Sequence[int], weights: Sequence[float | None]) -> np.ndarray:
    """Which rows a mixture takes, and in which order.

    Rows of each set keep their order and are spread evenly over the whole, so that any part of it
    (such as the last rows, which are held out) has the same shares. Nothing is repeated: the
    first rows of each set are taken until one of them is used up.

    Args:
        sizes: rows of each set.
        weights: shares, in proportion to each other; all None: every row of every set.

    Returns:
        [N] places in the concatenation of the sets.

    Example:
        >>> interleave([4, 2], [None, None]).tolist()
        [0, 4, 1, 2, 5, 3]
    """
    given = zip(sizes, weights, strict=True)
    shares = [float(size) if weight is None else weight for size, weight in given]
    scale = min(size / share for size, share in zip(sizes, shares, strict=True))
    # The rounding of 3 / 0.3 must not cost a row.
    counts = [int(scale * share + 1e-6) for share in shares]
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    taken = zip(starts, counts, strict=True)
    places = np.concatenate([start + np.arange(count) for start, count in taken])
    depths = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return places[np.argsort(depths, kind="stable")]
