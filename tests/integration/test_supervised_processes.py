"""Supervised stages in processes of their own: several that train together, and one that is killed.

No Ray: its workers run the same function (`test_supervised_on_ray.py`).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from prepared_runs import config_values, write_prepared
from safetensors.torch import load_file
from supervised_ranks import train_stage

from rlhf_ray.config import load
from rlhf_ray.observability.sinks import read_jsonl
from rlhf_ray.stages.pipeline import run_single

pytestmark = [pytest.mark.integration, pytest.mark.slow]

TRAINED_BY_ALL = Path(__file__).with_name("supervised_ranks.py")


def write_run(folder: Path, **sections: dict[str, Any]) -> Path:
    """A prepared run folder and its config, in a file."""
    write_prepared(folder)
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(config_values(folder, **sections)))
    return config


def command(config: Path, stage: str) -> list[str]:
    main = "from rlhf_ray.cli import main; main()"
    return [sys.executable, "-c", main, stage, str(config)]


def run_stage(config: Path, stage: str) -> None:
    """Run a stage to its end, here: another process would import everything again."""
    run_single(load(config), stage)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_together(stages: dict[str, tuple[Path, Path]], num_processes: int) -> None:
    """Train stages, each by its config into a folder, by processes that share each step."""
    shared = {
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    named = [f"{stage}={config}={out}" for stage, (config, out) in stages.items()]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TRAINED_BY_ALL), *named],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num_processes)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base for both stages."""
    folder = tmp_path_factory.mktemp("base") / "run"
    run_stage(write_run(folder), "pretrain")
    return str(folder / "pretrain" / "model")


def on_top_of(base: str, stage: str, keys: dict) -> dict[str, dict]:
    """Sections of a run whose one stage starts from a model that is there."""
    given = {"sft": {"path": base}} if stage == "reward" else {}
    own = keys | ({"block_size": 32} if stage == "sft" else {"eval_rows": 19})
    return {"model": {"path": base, "max_length": 64}, **given, stage: own}


STAGES = ("sft", "reward")


@pytest.fixture(scope="module")
def stepped(tmp_path_factory: pytest.TempPathFactory, pretrained: str) -> Path:
    """Folders ``STAGE-NUMBER`` of what one process and two have come to in one step."""
    # Plain gradient descent: Adam's first step has the size of the learning rate whatever the
    # gradient, and would make much of a rounding error in a gradient near zero.
    step = {"steps": 1, "batch_size": 8, "learning_rate": 0.5, "lora": {"dropout": 0.0}}
    step |= {"scheduler": "constant", "trainer": {"optim": "sgd"}}
    folder, together = tmp_path_factory.mktemp("stepped"), {}
    for stage in STAGES:
        sections = on_top_of(pretrained, stage, step)
        alone = write_run(folder / f"one-{stage}", **sections)
        train_stage(str(alone), stage, folder / f"{stage}-1")
        config = write_run(folder / f"two-{stage}", **sections)
        together[stage] = config, folder / f"{stage}-2"
    train_together(together, 2)
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_take_the_step_that_one_takes(stepped: Path, stage: str) -> None:
    found: list[dict[str, Any]] = []
    for number in (1, 2):
        out = stepped / f"{stage}-{number}"
        found.append(json.loads((out / "numbers.json").read_text()))
        found[-1]["weights"] = load_file(out / "weights.safetensors")
    one, two = found
    assert two["processes"] == 2
    for name in ("before_loss", "after_loss"):
        assert two[name] == pytest.approx(one[name], abs=1e-6)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-6, rtol=0)
    assert abs(one["after_loss"] - one["before_loss"]) > 1e-4  # the step was no empty one


def test_a_killed_training_resumes_with_the_same_command(tmp_path: Path, pretrained: str) -> None:
    """One stage stands for all: `inline/stages/test_supervised.py` has each of them."""
    stage = "reward"
    keys = {"steps": 60, "batch_size": 4, "trainer": {"save_steps": 10, "logging_steps": 5}}
    sections = on_top_of(pretrained, stage, keys)
    whole, killed = (write_run(tmp_path / name, **sections) for name in ("whole", "killed"))
    run_stage(whole, stage)
    with subprocess.Popen(command(killed, stage), stdout=subprocess.DEVNULL) as process:
        folder = tmp_path / "killed" / stage
        limit = time.monotonic() + 120
        while not list(folder.glob("trainer/checkpoint-*/trainer_state.json")):
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "summary.json").exists()
    run_stage(killed, stage)
    curves = [read_jsonl(tmp_path / name / stage / "metrics.jsonl") for name in ("whole", "killed")]
    assert [record["step"] for record in curves[1]] == list(range(5, 61, 5))
    assert curves[0] == curves[1]
    for file in ("model.safetensors", "adapter_model.safetensors"):
        for part in (tmp_path / "whole" / stage).glob(f"*/{file}"):
            again = load_file(tmp_path / "killed" / part.relative_to(tmp_path / "whole"))
            for name, weight in load_file(part).items():
                assert torch.equal(again[name], weight), name
