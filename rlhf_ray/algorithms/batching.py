"""Cutting a batch into micro-batches."""

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], max_tokens: int, at_least: int = 1) -> list[list[int]]:
    """Group rows so that a padded group has at most ``max_tokens`` tokens.

    Rows of like length go together, so that little of a group is padding.

    Args:
        lengths: [B] tokens of each row.
        max_tokens: most tokens of a group, its padding included; a longer single row goes alone.
        at_least: make no fewer groups (ranks must agree on their number); at most B are possible.

    Returns:
        Groups of row indices; each row is in exactly one.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups: list[list[int]] = []
    for row in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    while len(groups) < min(at_least, len(lengths)):
        largest = max(groups, key=len)
        half = len(largest) // 2
        groups.append(largest[half:])
        del largest[half:]
    return groups
