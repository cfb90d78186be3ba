"""A rehearsal and its run on real Ray, vLLM and DeepSpeed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rlhf_ray.observability.sinks import read_jsonl

if TYPE_CHECKING:
    from conftest import CommandLine

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CONFIG = """
run: {{name: mine, dir: {run}, stages: [ppo]}}
model: {{path: {llama}, max_length: 96}}
reward: {{path: {reward_model}}}
data: {{prompts: {{path: {prompts}}}}}
rewards:
  - {{type: model}}
  - {{type: function, name: mine, function: "{rewards}:of_length"}}
generators: {{num: 2}}
ppo: {{iterations: 3, batch_size: 8, mini_batch_size: 4, epochs: 1, eval_prompts: 8}}
rollout: {{max_prompt_tokens: 24, max_tokens: 12, shard_size: 2}}
"""

REWARDS = """
import os, pathlib

def of_length(completions, **_):
    with pathlib.Path(__file__).with_name("asked").open("a") as asked:
        print(os.getpid(), file=asked)
    return [float(len(text)) for text in completions]
"""


def test_two_iterations_at_the_worst_case_survive_the_loss_of_a_generator(
    command_line: "CommandLine", tmp_path: Path, llama: str, reward_model: str, prompts_file: Path
) -> None:
    run, config, rewards = (tmp_path / name for name in ("run", "config.yaml", "rewards.py"))
    rewards.write_text(REWARDS)
    models = {"llama": llama, "reward_model": reward_model, "prompts": prompts_file}
    config.write_text(CONFIG.format(run=run, rewards=rewards, **models))
    command_line.run("run", str(config), "--rehearse")

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

    assert len(set((tmp_path / "asked").read_text().split())) == 1, "the run's scorer alone asks"
    assert len(read_jsonl(run / "ppo" / "metrics.jsonl")) == 3
    planned = command_line.run("plan", str(config))
    assert "seconds are from the rehearsal of" in planned
    command_line.wait_until_nothing_left()
