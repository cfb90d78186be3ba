from pathlib import Path

import pytest

from rlhf_ray.observability import metrics

ROOT = Path(__file__).parents[3]


def test_docs_list_the_registered_metrics():
    if (ROOT / "docs" / "metrics.md").read_text() != metrics.markdown_table():
        pytest.fail("docs/metrics.md is out of date: run scripts/docs.sh")


def test_check_names_the_unknown_metric_and_the_nearest_one():
    metrics.check(["objective/kl", "timing_s/gen"])
    with pytest.raises(KeyError, match=r"objective/k1 \(nearest: objective/kl\)"):
        metrics.check(["objective/kl", "objective/k1"])


def test_every_row_is_registered_once_and_in_full():
    assert len(metrics.METRICS) == len(metrics._ROWS)
    for metric in metrics.METRICS.values():
        assert all((metric.unit, metric.reduction, metric.meaning.endswith(".")))


def test_a_bar_in_a_meaning_does_not_break_the_table():
    rows = [line for line in metrics.markdown_table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(metrics.METRICS)
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)
