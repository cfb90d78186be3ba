"""Export metrics through Ray to Prometheus as ``ray_rlhf_ray_<name>{run, role, rank}``.

All are gauges: a logged value is already a sum, a mean or a share over an iteration.
"""

from collections.abc import Mapping

import ray
from ray.util.metrics import Gauge

from rlhf_ray.observability.metrics import metric
from rlhf_ray.observability.series import LABELS, series
from rlhf_ray.observability.sinks import Sink

_GONE = float("nan")
"""Ray stops exporting a series that is set to NaN."""


class RaySink:
    """Sets one gauge per metric.

    Args:
        run: name of the run.
        role: the ``role`` label of metrics whose own name carries none.
    """

    def __init__(self, run: str, role: str) -> None:
        self._labels = {"run": run, "role": role, "rank": "0"}
        self._gauges: dict[str, Gauge] = {}
        self._set: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Set the gauges of these metrics; the others keep their values."""
        for name, value in metrics.items():
            self._set_gauge(name, value)
            self._set.add(name)

    def close(self) -> None:
        """Remove the series: a finished run has no current values."""
        for name in self._set:
            self._set_gauge(name, _GONE)
        self._set.clear()

    def _set_gauge(self, name: str, value: float) -> None:
        exported = series(name)
        if exported.name not in self._gauges:
            keys = tuple(dict.fromkeys((*LABELS, *exported.labels)))
            self._gauges[exported.name] = Gauge(exported.name, metric(name).meaning, keys)
        self._gauges[exported.name].set(float(value), {**self._labels, **exported.labels})


def ray_sinks(run: str, role: str) -> list[Sink]:
    """Return a `RaySink` where Ray is running, else no sink."""
    return [RaySink(run, role)] if ray.is_initialized() else []
