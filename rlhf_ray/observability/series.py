"""What a metric of the registry is called in Prometheus, and what labels tell it apart."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_ray.observability.metrics import registered_as

PREFIX = "rlhf_ray_"
"""Of every name that we give to Ray."""

EXPORTED_PREFIX = f"ray_{PREFIX}"
"""Of every name that Prometheus gets: Ray puts its own in front."""

LABELS = ("run", "role", "rank")
"""What every series is told apart by."""


@dataclass(frozen=True)
class Series:
    """One number as Prometheus sees it."""

    name: str
    """Such as ``rlhf_ray_objective_kl``."""
    labels: Mapping[str, str]
    """What the metric's own name says, such as ``{"source": "model"}``."""


def series(metric: str) -> Series:
    """The series of a registered metric.

    A name of a family (``objective/scores/<source>``) is one series with a label; an actor is
    told by its role and rank.
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
    """The name in Prometheus of a metric by its name in the registry."""
    return f"ray_{series(registered).name}"
