"""Measures of repetition in a response, often the first sign of a policy that games its reward."""

from collections.abc import Sequence
from itertools import groupby, pairwise

RUN = 4
"""Number of identical tokens in a row that counts as repetition."""


def repeats_a_token(tokens: Sequence[int]) -> bool:
    """Return whether a response has the same token `RUN` times or more in a row."""
    return any(len(list(run)) >= RUN for _, run in groupby(tokens))


def distinct_bigrams(tokens: Sequence[int]) -> float:
    """Return the share of a response's bigrams that are distinct; 1 if it is too short for any.

    Source: distinct-2, Li et al. 2016 (arXiv:1510.03055), here within one response.
    """
    bigrams = list(pairwise(tokens))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0
