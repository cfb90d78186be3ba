"""Which GPUs the processes of a run see, and a run that finds too few, on simulated nodes."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from simulated_clusters import simulated_cluster

from rlhf_ray.cluster.session import ray_session
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.config import load
from rlhf_ray.errors import PlacementError
from rlhf_ray.placement.layout import demands
from rlhf_ray.stages import pipeline

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

NONE = ("", "")
CHILD = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"


class Looker:
    """An actor that does nothing but look."""

    def __init__(self, name: str) -> None:
        self._name = name


def visible(_: Any = None) -> tuple[str | None, str]:
    """Return what this process sees, and what one that it starts sees."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, check=True
    )
    return os.environ.get("CUDA_VISIBLE_DEVICES"), child.stdout.strip()


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    """A node whose own environment shows its GPUs to every process."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        patch.setenv("RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES", "1")
        with simulated_cluster([{"num_gpus": 2}]):
            yield
    ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.mark.parametrize("gpus", ["0", "0.25"])
async def test_a_role_sees_the_gpus_that_it_holds_and_no_other(two_gpus: None, gpus: str) -> None:
    """So does a user's reward function, in a process that its scorer starts."""
    config = load(None, ["cluster.mode=ray", f"placement.gpus={gpus}", "placement.timeout_s=20"])
    with ray_session(config):
        spawner = RoleSpawner(config, lambda *_: None)
        asked = demands(config)
        await spawner.place(asked)
        for demand in asked:
            spawner.spawn(Looker, demand.role, demand.workers)
        spawner.spawn(Looker, "function", 2)  # placed nowhere, like scorers without models
        workers: list[Any] = spawner.workers
        seen = await asyncio.gather(*(w.actor.__ray_call__.remote(visible) for w in workers))
        await spawner.stop_all()
    assert seen[len(asked) :] == [NONE, NONE]
    expected = {NONE} if gpus == "0" else {("0", "0"), ("1", "1")}
    assert set(seen[: len(asked)]) <= expected


def test_a_stage_that_trains_on_cpus_sees_no_gpu(two_gpus: None, tmp_path: Any) -> None:
    config = load(None, ["cluster.mode=ray", "placement.gpus=0"])
    with ray_session(config):
        scaling = ScalingConfig(num_workers=1)
        run = ray.train.RunConfig(storage_path=str(tmp_path))
        found = TorchTrainer(visible, scaling_config=scaling, run_config=run).fit().return_value
    assert found == NONE


def test_a_cluster_that_is_too_small_for_ppo_is_refused_before_the_first_stage(
    two_gpus: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []
    monkeypatch.setattr(pipeline, "run_stage", lambda _, stage: begun.append(stage))
    monkeypatch.setattr(pipeline, "require_same_files", lambda *_: [])
    keys = ["cluster.mode=ray", f"run.dir={tmp_path / 'run'}", "placement.timeout_s=2"]
    with pytest.raises(PlacementError, match=r"in total 5\. Available: .* Waited 2 s for free"):
        pipeline.run(load("@quickstart", keys))
    assert begun == []
