"""The library's surface: a run is opened, and asked for what its folder holds."""

import subprocess
import sys
from pathlib import Path

import pytest
from recorded_runs import record_run

from rlhf_ray import ConfigError, DataError, Run


@pytest.fixture
def recorded(tmp_path: Path) -> Run:
    return Run(record_run(tmp_path / "recorded", iterations=5, samples=4))


def test_opening_a_run_loads_no_torch() -> None:
    code = "import sys, rlhf_ray; assert rlhf_ray.Run; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metrics_are_a_table_by_iteration(recorded: Run) -> None:
    table = recorded.metrics()
    assert list(table.index) == [1, 2, 3, 4]
    assert {"objective/scores", "objective/kl"} <= {*table.columns}
    assert recorded.metrics("sft").empty
    assert list(recorded.evaluations().index) == list(range(6))


def test_samples_are_the_newest_ones(recorded: Run) -> None:
    samples = recorded.samples(6)
    assert list(samples["iteration"]) == [5, 5, 5, 5, 4, 4]
    assert len(recorded.samples()) == 20


def test_named_metrics_are_drawn_and_others_refused(recorded: Run) -> None:
    titles = [axis.get_title() for axis in recorded.plot("objective/kl").axes]
    assert titles == ["objective/kl"]
    with pytest.raises(DataError, match="no metric loss; it logged: objective/scores"):
        recorded.plot("loss")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run: {name: a}")
    for path in (tmp_path / "missing", config):
        with pytest.raises(ConfigError, match="not the folder of a run"):
            Run(path)
