"""Metrics to Ray, whose metrics port Prometheus reads: ``ray_rlhf_ray_<name>{run, role, rank}``.

All are gauges: a logged value is already a sum, a mean or a share over an iteration.
"""

from collections.abc import Mapping

import ray
from ray.util.metrics import Gauge

from rlhf_ray.observability.metrics import METRICS, registered_as
from rlhf_ray.observability.series import LABELS, series
from rlhf_ray.observability.sinks import Sink

_GONE = float("nan")
"""Ray drops a series that is set to this."""


class RaySink:
    """Sets a gauge for each metric.

    Args:
        run: name of the run.
        role: whose numbers they are where a metric's name does not say so.
    """

    def __init__(self, run: str, role: str) -> None:
        self._labels = {"run": run, "role": role, "rank": "0"}
        self._gauges: dict[str, Gauge] = {}
        self._set: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set what there is a value for; the others keep theirs."""
        for metric, value in metrics.items():
            self._set_gauge(metric, value)
            self._set.add(metric)

    def close(self) -> None:
        """Take the series away: what has ended has no current value."""
        for metric in self._set:
            self._set_gauge(metric, _GONE)
        self._set.clear()

    def _set_gauge(self, metric: str, value: float) -> None:
        found = series(metric)
        if found.name not in self._gauges:
            keys = tuple(dict.fromkeys((*LABELS, *found.labels)))
            meaning = METRICS[registered_as(metric) or metric].meaning
            self._gauges[found.name] = Gauge(found.name, meaning, keys)
        self._gauges[found.name].set(float(value), {**self._labels, **found.labels})


def ray_sinks(run: str, role: str) -> list[Sink]:
    """A `RaySink` where Ray runs, else none."""
    return [RaySink(run, role)] if ray.is_initialized() else []
