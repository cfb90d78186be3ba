"""Metrics of micro-batches, added up to those of an iteration."""

import math
from collections.abc import Mapping
from operator import add

from torch import Tensor

from rlhf_ray.observability.metrics import metric


class Tally:
    """Metrics of micro-batches, reduced as registered: token-weighted means, or maxima."""

    def __init__(self) -> None:
        self.num_tokens = 0
        """Tokens added so far, those of each epoch: the weights of the means."""
        self._totals: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor], num_tokens: int) -> None:
        """Add the metrics of a micro-batch of ``num_tokens``."""
        self.num_tokens += num_tokens
        for name, value in metrics.items():
            self._count(name, float(value) * (1 if _is_maximum(name) else num_tokens))

    def merge(self, other: "Tally") -> None:
        """Add another tally."""
        self.num_tokens += other.num_tokens
        for name, total in other._totals.items():
            self._count(name, total)

    def _count(self, name: str, total: float) -> None:
        merge = max if _is_maximum(name) else add
        self._totals[name] = merge(self._totals[name], total) if name in self._totals else total

    def total(self, name: str) -> float:
        """Return a metric's sum over tokens."""
        return self._totals[name]

    def is_finite(self) -> bool:
        """Return whether all that was added is finite."""
        return all(map(math.isfinite, self._totals.values()))

    def means(self) -> dict[str, float]:
        """Return every metric; none if nothing was added."""
        return {
            name: total if _is_maximum(name) else total / self.num_tokens
            for name, total in self._totals.items()
        }


def _is_maximum(name: str) -> bool:
    return metric(name).reduction.how == "maximum"
