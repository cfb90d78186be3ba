"""A run folder that an older version wrote is resumed as that version resumed it.

`fixtures/run_before_rooms.tar.gz` holds a tiny run that stopped after two of three iterations, made
by the last version before modules moved into rooms, and the third iteration's metrics as that
version went on to log them.
"""

import json
import math
import tarfile
from pathlib import Path

import pytest

from rlhf_ray.config import load
from rlhf_ray.stages import pipeline

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run_before_rooms.tar.gz"
NEWER = {"generators/reissued", "timing_s/keep"}
"""Metrics that came after that version."""
OF_THE_CLOCK = ("timing_s/", "throughput/", "generators/idle_share")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The run's folder and, beside it, what is expected."""
    with tarfile.open(FIXTURE) as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            archive.extractall(tmp_path, filter="data")
        else:
            archive.extractall(tmp_path)
    return tmp_path / "run"


def test_a_run_of_an_older_version_is_resumed(folder: Path) -> None:
    metrics = folder / "ppo" / "metrics.jsonl"
    before = metrics.read_text()

    pipeline.run(load(folder / "config.yaml", [f"run.dir={folder}", "ppo.iterations=3"]))

    after = metrics.read_text()
    assert after.startswith(before), "what was learnt before stays as it was"
    (resumed,) = map(json.loads, after[len(before) :].splitlines())
    expected = json.loads((folder.parent / "expected.jsonl").read_text())
    assert resumed.keys() - NEWER == expected.keys()
    for name, value in expected.items():
        if not name.startswith(OF_THE_CLOCK):
            assert math.isclose(resumed[name], value, rel_tol=1e-4, abs_tol=1e-6), name
    summary = json.loads((folder / "ppo" / "summary.json").read_text())
    assert summary["iterations"] == summary["adapter_version"] == 3
    assert summary["samples_generated"] == summary["samples_learnt"] == 24
