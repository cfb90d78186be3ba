"""How much a response repeats itself: what a policy that games its reward gives away first."""

from collections.abc import Sequence
from itertools import groupby, pairwise

RUN = 4
"""Identical tokens in a row that count as repetition."""


def repeats_a_token(tokens: Sequence[int]) -> bool:
    """Whether a response holds the same token `RUN` times or more in a row."""
    return any(len(list(run)) >= RUN for _, run in groupby(tokens))


def distinct_bigrams(tokens: Sequence[int]) -> float:
    """Share of distinct bigrams among those of a response; 1 where it is too short to have any.

    Source: distinct-2, Li et al. 2016 (arXiv:1510.03055), here within one response.
    """
    bigrams = list(pairwise(tokens))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0
