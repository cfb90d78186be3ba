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
def test_the_members_of_a_family_share_a_series_and_differ_in_labels(
    metric: str, name: str, labels: dict[str, str]
) -> None:
    found = series(metric)
    assert (found.name, dict(found.labels)) == (name, labels)


def test_every_registered_metric_has_a_unique_valid_prometheus_name() -> None:
    names = [exported(metric) for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"ray_rlhf_ray_[a-z0-9_]+", name) for name in names)
