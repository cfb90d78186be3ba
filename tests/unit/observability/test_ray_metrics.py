import math

import pytest

from rlhf_ray.observability import ray_metrics
from rlhf_ray.observability.ray_metrics import RaySink, ray_sinks


class Gauge:
    """Ray's gauge as far as it goes without Ray."""

    series: dict[tuple[str, tuple[tuple[str, str], ...]], float]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        assert description
        self.name, self.tag_keys = name, tag_keys

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert type(value) is float
        assert set(tags) == set(self.tag_keys)
        Gauge.series[self.name, tuple(sorted(tags.items()))] = value


@pytest.fixture
def series(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    Gauge.series = {}
    monkeypatch.setattr(ray_metrics, "Gauge", Gauge)
    return Gauge.series


def labels(**more: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"run": "demo", "role": "driver", "rank": "0", **more}.items()))


def test_each_metric_is_a_gauge_with_run_role_and_rank(series: dict[object, float]) -> None:
    sink = RaySink("demo", "driver")
    sink.log(1, {"objective/kl": 2, "objective/scores/model": 0.5, "actors/busy/policy-1": 0.25})
    sink.log(2, {"objective/kl": 3.0, "objective/scores/length": 0.75})
    assert series == {
        ("rlhf_ray_objective_kl", labels()): 3.0,
        ("rlhf_ray_objective_scores_source", labels(source="model")): 0.5,
        ("rlhf_ray_objective_scores_source", labels(source="length")): 0.75,
        ("rlhf_ray_actors_busy_actor", labels(role="policy", rank="1")): 0.25,
    }


def test_a_closed_sink_leaves_no_current_values(series: dict[object, float]) -> None:
    sink = RaySink("demo", "driver")
    sink.log(1, {"objective/kl": 2.0, "actors/busy/policy-1": 0.25})
    sink.close()
    assert len(series) == 2
    assert all(math.isnan(value) for value in series.values())


def test_without_ray_there_is_no_sink() -> None:
    assert ray_sinks("demo", "driver") == []
