import math
from pathlib import Path

import pytest

from rlhf_ray.observability import metrics
from rlhf_ray.observability.registry import ROWS

ROOT = Path(__file__).parents[3]


def test_docs_list_the_registered_metrics():
    if (ROOT / "docs" / "metrics.md").read_text() != metrics.markdown_table():
        pytest.fail("docs/metrics.md is out of date: run scripts/docs.sh")


def test_check_names_the_unknown_metric_and_the_nearest_one():
    metrics.check(["objective/kl", "timing_s/gen"])
    with pytest.raises(KeyError, match=r"objective/k1 \(nearest: objective/kl\)"):
        metrics.check(["objective/kl", "objective/k1"])


def test_every_row_is_registered_once_and_in_full():
    assert len(metrics.METRICS) == len(ROWS)
    for metric in metrics.METRICS.values():
        assert all((metric.unit, str(metric.reduction), metric.meaning.endswith(".")))


@pytest.mark.parametrize(
    ("name", "merged"),
    [
        ("policy/clipfrac_avg", 3.25),  # (1 * 10 + 4 * 30) / 40
        ("val/ratio_max", 4.0),
        ("val/ratio_minibatch_max", 4.0),
        ("objective/missing/judge", 5.0),
        ("policy/ratio_exceeded", 1.0),
    ],
)
def test_a_metric_of_several_ranks_is_merged_by_its_reduction(name: str, merged: float):
    assert metrics.metric(name).reduction.merge([1.0, 4.0], [10, 30]) == merged


@pytest.mark.parametrize("value", [0.25, math.nan])
def test_a_statistic_that_every_rank_computed_from_the_whole_batch_is_theirs(value: float):
    merged = metrics.metric("val/explained_variance").reduction.merge([value] * 3, [10, 30, 0])
    assert merged == pytest.approx(value, nan_ok=True)


def test_a_statistic_of_parts_of_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"1\.0, 4\.0, of .* 'over samples', which cannot"):
        metrics.metric("objective/scores_std").reduction.merge([1.0, 4.0], [10, 30])


def test_a_bar_in_a_meaning_does_not_break_the_table():
    rows = [line for line in metrics.markdown_table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(metrics.METRICS)
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)
