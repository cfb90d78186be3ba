"""What Ray is started with on a machine of the run's own."""

import pytest

from rlhf_ray.cluster.session import num_logical_cpus
from rlhf_ray.config import load


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_every_process_of_a_stage_that_ray_trains_finds_a_cpu(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    keys = [f"{stage}.train_workers=40", f"{stage}.batch_size=40"]
    # Ray Train's controller has one as well.
    assert num_logical_cpus(load(None, keys)) > 40
    assert num_logical_cpus(load(None)) < 40
