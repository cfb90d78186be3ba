"""A run whose driver was killed goes on from its last commit, and sweeps what the dead one left."""

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import CommandLine

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(590)]

ITERATIONS = 4
CONFIG = """
cluster:
  dashboard: false
model:
  max_length: 96
lora: {{r: 8}}
ppo:
  iterations: {iterations}
  batch_size: 8
  mini_batch_size: 4
  epochs: 2
  learning_rate: 1.0e-3
  eval_every: 100
  eval_prompts: 8
critic:
  learning_rate: 1.0e-3
rollout:
  max_prompt_tokens: 64
  max_tokens: 16
  shard_size: 4
"""
VARIES = ("timing_s/", "throughput/", "generators/")
"""Metrics that are of the clock."""


def metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "ppo" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def wait_for_commit(command_line: "CommandLine", process: Any, run: Path, version: int) -> None:
    """Wait until a version is committed; poll far faster than the work after a commit takes."""
    deadline = time.monotonic() + 300
    while not (run / "checkpoints" / str(version) / "state.json").is_file():
        assert process.poll() is None, f"the run ended by itself:\n{command_line.output()}"
        assert time.monotonic() < deadline, f"no commit:\n{command_line.output()}"
        time.sleep(0.005)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    command_line: "CommandLine", tmp_path: Path, llama: str, reward_model: str, prompts_file: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(iterations=ITERATIONS), encoding="utf-8")
    models = (f"model.path={llama}", f"reward.path={reward_model}")
    common = ("run.stages=[ppo]", *models, f"data.prompts.path={prompts_file}")

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command_line.run("run", str(config), f"run.dir={whole}", *common)
    command_line.wait_until_nothing_left()

    process = command_line.start("run", str(config), f"run.dir={killed}", *common)
    wait_for_commit(command_line, process, killed, version=2)
    process.kill()
    process.wait(10)
    saved = max(int(path.parent.name) for path in killed.glob("checkpoints/[0-9]*/state.json"))
    before = metrics(killed)[:saved]  # records may run ahead of the commit
    dead = {(left.pid, left.create_time()) for left in command_line.processes()}
    assert dead or command_line.shared_memory_files(), "nothing left: there is nothing to sweep"

    command_line.run("run", str(config), f"run.dir={killed}", *common, "policy.num_ranks=2")
    after = metrics(killed)
    assert [record["iteration"] for record in after] == [1, 2, 3, 4]
    assert after[: len(before)] == before, "records of what was committed are as they were"
    for resumed, uninterrupted in zip(after, metrics(whole), strict=True):
        for name, value in uninterrupted.items():
            if not name.startswith(VARIES):
                assert math.isclose(resumed[name], value, rel_tol=1e-4, abs_tol=1e-4), (
                    f"iteration {resumed['iteration']}: {name} {resumed[name]} against {value}"
                )
    summary = json.loads((killed / "ppo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["iterations"] == summary["adapter_version"] == ITERATIONS
    assert summary["samples_generated"] == summary["samples_learnt"] == 8 * ITERATIONS
    alive = {(left.pid, left.create_time()) for left in command_line.processes()}
    assert not dead & alive
    command_line.wait_until_nothing_left()
