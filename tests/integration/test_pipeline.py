"""A whole run through the command line, over real Ray, vLLM and DeepSpeed."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import CommandLine

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]

SMALL_RUN = """
cluster:
  dashboard: false
model:
  max_length: 96
  tiny: {hidden_size: 64, intermediate_size: 128, num_heads: 2}
prepare:
  num_questions: 120
pretrain: {steps: 4, batch_size: 4, block_size: 64, eval_rows: 8}
sft: {steps: 2, batch_size: 4, block_size: 64, packing: concat, eval_rows: 8}
reward: {steps: 2, batch_size: 4, eval_rows: 8}
ppo:
  iterations: 2
  batch_size: 8
  mini_batch_size: 4
  epochs: 2
  save_every: 1
  eval_every: 2
  eval_prompts: 8
rollout:
  max_prompt_tokens: 64
  max_tokens: 16
  shard_size: 4
evaluate:
  num_prompts: 8
"""


def summary(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "summary.json").read_text(encoding="utf-8"))


def test_every_stage_runs_once(command_line: "CommandLine", tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(SMALL_RUN, encoding="utf-8")
    run = tmp_path / "run"
    command_line.run("run", str(config), f"run.dir={run}")

    ppo = summary(run, "ppo")
    assert ppo["iterations"] == ppo["adapter_version"] == 2
    assert ppo["samples_generated"] == ppo["samples_learnt"] == ppo["episodes"] == 16
    assert ppo["samples_requeued"] == ppo["generator_restarts"] == 0
    records = [json.loads(line) for line in (run / "ppo" / "metrics.jsonl").open(encoding="utf-8")]
    assert [record["iteration"] for record in records] == [1, 2]
    assert [record["policy/version"] for record in records] == [1, 2]
    assert all(record["sampler/gap_mean"] < 1e-4 for record in records)
    assert summary(run, "reward")["pairs_eval"] > 0
    assert set(summary(run, "evaluate")["models"]) == {"sft", "ppo"}
    evaluation = summary(run, "evaluate")
    assert (evaluation["policy_version"], evaluation["judge"]) == (2, "gold")
    assert 0 <= evaluation["win_rate"]["value"] <= 1
    assert (run / "report.html").stat().st_size > 10_000
    assert (run / "checkpoints" / "latest" / "policy" / "adapter_model.safetensors").is_file()
    command_line.wait_until_nothing_left()
