"""Names and labels of registered metrics in Prometheus."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_ray.observability.metrics import registered_as

PREFIX = "rlhf_ray_"
"""Begins every metric name that we give to Ray."""

EXPORTED_PREFIX = f"ray_{PREFIX}"
"""Begins every name in Prometheus, because Ray adds a prefix of its own."""

LABELS = ("run", "role", "rank")
"""Labels of every series."""


@dataclass(frozen=True)
class Series:
    """A metric as Prometheus sees it."""

    name: str
    """Name such as ``rlhf_ray_objective_kl``."""
    labels: Mapping[str, str]
    """Labels taken from the metric's own name, such as ``{"source": "model"}``."""


def series(metric: str) -> Series:
    """Return the series of a registered metric.

    A family such as ``objective/scores/<source>`` is one series with a label; actors are labelled
    by role and rank.
    """
    registered = registered_as(metric) or metric
    start, _, label = registered.rstrip(">").partition("<")
    name = PREFIX + re.sub(r"\W+", "_", f"{start}{label}").strip("_")
    member = metric.removeprefix(start)
    if label == "actor":
        role, _, rank = member.rpartition("-")
        return Series(name, {"role": role, "rank": rank})
    return Series(name, {label: member} if label else {})


def exported(registered: str) -> str:
    """Return the name in Prometheus of a metric in the registry."""
    return f"ray_{series(registered).name}"
