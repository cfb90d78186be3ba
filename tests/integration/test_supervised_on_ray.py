"""Supervised stages in real Ray Train workers."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prepared_runs
import pytest
import ray
import torch
from datasets import Dataset
from safetensors.torch import load_file

from rlhf_ray.cluster.session import ray_session
from rlhf_ray.config import Config
from rlhf_ray.errors import ActorFailure, DivergenceError, PlacementError
from rlhf_ray.stages.supervised import launcher as supervised
from rlhf_ray.stages.supervised import pretrain
from rlhf_ray.stages.supervised.pretrain import PretrainTraining

pytestmark = pytest.mark.integration


def make_config(folder: str, mode: str, **stage: Any) -> Config:
    return prepared_runs.make_config(
        Path(folder),
        cluster={"mode": mode, "dashboard": False},
        data={"pretrain": {"path": "texts"}},
        pretrain={"steps": 8, **stage},
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder to run in, with rows of text, and Ray: relative paths must hold in its workers."""
    folder = tmp_path_factory.mktemp("on_ray")
    Dataset.from_dict({"text": [f"number {i} " * 5 for i in range(100)]}).save_to_disk(
        str(folder / "texts")
    )
    before = Path.cwd()
    os.chdir(folder)
    try:
        with ray_session(make_config("unused", "local", train_workers=2)):
            yield folder
    finally:
        os.chdir(before)


def test_two_workers_train_what_one_process_trains(workplace: Path) -> None:
    summaries = [
        pretrain.run(make_config("inline", "inline")),
        pretrain.run(make_config("two", "local", train_workers=2)),
    ]
    assert summaries[1]["loss_after"] == pytest.approx(summaries[0]["loss_after"], abs=1e-4)
    weights = [
        load_file(workplace / run / "pretrain/model/model.safetensors") for run in ("inline", "two")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-4, rtol=1e-3)
    files = {path.name for path in (workplace / "two" / "pretrain").iterdir()}
    assert files == {"base", "model", "metrics.jsonl", "summary.json", "tensorboard"}
    lines = (workplace / "two" / "pretrain" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 8


def test_an_error_in_a_worker_reaches_the_user(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = make_config(
        "wild",
        "local",
        learning_rate=1e30,
        scheduler="constant",
        trainer={"max_grad_norm": 0.0},
    )
    with pytest.raises(DivergenceError, match="the loss of step"):
        pretrain.run(wild)
    with pytest.raises(PlacementError, match="train_workers=400 needs 400 CPUs"):
        pretrain.run(make_config("many", "local", train_workers=400, batch_size=400))


def test_processes_of_a_local_run_ask_its_own_cluster_beside_others(workplace: Path) -> None:
    # Ray's state API, with which Ray Train watches its controller, looks for processes like this.
    other = 'exec -a raylet "$0" -c "import time; time.sleep(60)" --gcs-address=127.0.0.1:1'
    raylet = subprocess.Popen(["bash", "-c", other, sys.executable])

    @ray.remote(num_cpus=0)
    def addresses() -> tuple[str, str]:
        from ray._private.services import canonicalize_bootstrap_address_or_die as find

        return find(None), ray.get_runtime_context().gcs_address

    try:
        found, own = ray.get(addresses.remote())
    finally:
        raylet.kill()
        raylet.wait()
    assert found == own


class KilledTraining(PretrainTraining):
    """A stage whose process dies as by the kernel's out-of-memory killer."""

    def load_model(self) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_stage_with_a_remedy(workplace: Path) -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    config = make_config("killed", "local")
    work = supervised.open_training(KilledTraining, config, str(workplace / "inline/pretrain/base"))
    rows = Dataset.from_dict({"input_ids": [[5] * 32] * 4})
    with pytest.raises(ActorFailure, match="Run the same command again"):
        supervised.run_training(work, {"train": rows, "held_out": rows})
    assert not (work.folder / "ray").exists()
