"""A rehearsal on real Ray, vLLM and DeepSpeed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rlhf_ray.observability.sinks import read_jsonl

if TYPE_CHECKING:
    from conftest import CommandLine

pytestmark = pytest.mark.integration

CONFIG = """
run: {{name: mine, dir: {run}, stages: [ppo]}}
model: {{path: {llama}, max_length: 96}}
reward: {{path: {reward_model}}}
rewards:
  - {{type: model}}
  - {{type: function, name: mine, function: "nowhere:reads_columns"}}
generators: {{num: 2}}
ppo: {{iterations: 50, batch_size: 8, mini_batch_size: 4, epochs: 1, eval_prompts: 8}}
rollout: {{max_prompt_tokens: 24, max_tokens: 12, shard_size: 2}}
"""


def test_two_iterations_at_the_worst_case_survive_the_loss_of_a_generator(
    command_line: "CommandLine", tmp_path: Path, llama: str, reward_model: str
) -> None:
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(CONFIG.format(run=run, llama=llama, reward_model=reward_model))
    command_line.run("rehearse", str(config))

    found = json.loads((run / "rehearsal.json").read_text())
    assert found["samples"] == 16
    assert found["generator_restarts"] == 1
    workers = {"policy-0", "critic-0", "reference-0", "reward-0", "generator-1"}
    assert workers <= set(found["peak_memory_bytes"])
    assert min(found["peak_memory_bytes"].values()) > 10**8  # Python with its libraries
    assert {"gen", "score", "learn", "commit", "sync", "save"} <= set(found["seconds"])
    records = read_jsonl(run / "rehearsal" / "ppo" / "metrics.jsonl")
    assert [record["response_length/mean"] for record in records] == [12, 12]
    evaluations = read_jsonl(run / "rehearsal" / "ppo" / "eval.jsonl")
    assert evaluations[-1]["iteration"] == 2
    assert not (run / "checkpoints").exists()  # the run itself has not begun

    planned = command_line.run("plan", str(config))
    assert "seconds are from the rehearsal of" in planned
    command_line.wait_until_nothing_left()
