import re

import pytest

from rlhf_ray.observability.metrics import METRICS
from rlhf_ray.observability.series import exported, series


@pytest.mark.parametrize(
    ("metric", "name", "labels"),
    [
        ("objective/kl", "rlhf_ray_objective_kl", {}),
        ("objective/scores", "rlhf_ray_objective_scores", {}),
        ("objective/scores_std", "rlhf_ray_objective_scores_std", {}),
        ("objective/scores/model", "rlhf_ray_objective_scores_source", {"source": "model"}),
        ("objective/scores/a/b", "rlhf_ray_objective_scores_source", {"source": "a/b"}),
        ("actors/busy/policy-3", "rlhf_ray_actors_busy_actor", {"role": "policy", "rank": "3"}),
    ],
)
def test_a_metric_is_one_series_and_its_members_are_told_by_labels(
    metric: str, name: str, labels: dict[str, str]
) -> None:
    found = series(metric)
    assert (found.name, dict(found.labels)) == (name, labels)


def test_every_registered_metric_has_a_name_of_its_own_that_prometheus_takes() -> None:
    names = [exported(metric) for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"ray_rlhf_ray_[a-z0-9_]+", name) for name in names)
