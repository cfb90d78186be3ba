"""How a mini-batch is dealt out to ranks, and cut into the passes of each."""

from collections.abc import Sequence

import numpy as np
import torch


def balanced(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Deal rows out so that all shares have about as many tokens, and none is empty.

    The longest row goes to the share with the fewest tokens. Source: Graham 1969, "Bounds on
    Multiprocessing Timing Anomalies": the largest share is at most 4/3 of the best one.

    Args:
        lengths: [B] tokens of each row, B at least ``num_shares``.
        num_shares: number of shares.

    Returns:
        Row indices of each share, in order.
    """
    shares, tokens = [list[int]() for _ in range(num_shares)], [0] * num_shares
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        share = tokens.index(min(tokens))
        shares[share].append(row)
        tokens[share] += lengths[row]
    return [sorted(share) for share in shares]


PASS_TOKENS = {"cpu": 24, "cuda": 256}
"""What a pass costs besides its tokens, in tokens, by the device's type: the calls of layers, and
on GPUs the reading of weights, in which an A100 computes about 150 tokens, an H100 about 300."""


def micro_batches(
    lengths: Sequence[int], max_tokens: int, device: torch.device, at_least: int = 1
) -> list[list[int]]:
    """Group rows so that padding and the number of passes cost least together.

    Rows of similar length are grouped: of all cuts of the rows in order of their length, this is
    the one with the fewest tokens, padding and `PASS_TOKENS` a group included.

    Args:
        lengths: [B] tokens of each row.
        max_tokens: limit of tokens per group, padding included; a longer row is a group by itself.
        device: where the passes are computed.
        at_least: minimum number of groups, because ranks must agree on it; at most B are made.

    Returns:
        Groups of row indices; each row is in exactly one.
    """
    of_pass = PASS_TOKENS.get(device.type, PASS_TOKENS["cuda"])
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    longest_first = np.array([lengths[row] for row in order], dtype=np.int64)
    least = np.zeros(len(order) + 1)  # cost of the first rows, by their number
    first = np.zeros(len(order) + 1, dtype=np.int64)  # of the last group of them
    for end in range(1, len(order) + 1):
        begins = np.arange(end)
        padded = (end - begins) * longest_first[:end]
        is_allowed = (padded <= max_tokens) | (begins == end - 1)
        costs = np.where(is_allowed, least[:end] + padded + of_pass, np.inf)
        first[end] = costs.argmin()
        least[end] = costs[first[end]]
    groups: list[list[int]] = []
    end = len(order)
    while end:
        groups.insert(0, order[first[end] : end])
        end = int(first[end])
    while len(groups) < min(at_least, len(lengths)):
        largest = max(groups, key=len)
        half = len(largest) // 2
        groups.append(largest[half:])
        del largest[half:]
    return groups
