"""Llama 3, Qwen2.5 and Qwen3 shapes through SFT, reward, PPO and export, as chats.

In this process, but for vLLM's engine: what a family changes is in learners and engine, and not in
Ray. One of them goes through Ray and DeepSpeed as well, on a quantised base.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from model_families import FAMILIES, TEXTS, Family, build
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.config import load
from rlhf_ray.serving import export
from rlhf_ray.stages import pipeline
from rlhf_ray.stages.ppo import stage as ppo

if TYPE_CHECKING:
    from conftest import CommandLine

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("vllm_here"),
]

RUN = """
cluster:
  dashboard: false
template:
  kind: chat
model:
  max_length: 96
sft: {steps: 4, batch_size: 4, block_size: 64, eval_rows: 8, learning_rate: 1.0e-3}
reward: {steps: 4, batch_size: 4, eval_rows: 8, learning_rate: 1.0e-3}
lora: {r: 4}
reference: {kind: policy_base}
ppo:
  iterations: 2
  batch_size: 8
  mini_batch_size: 4
  epochs: 2
  learning_rate: 1.0e-3
  save_every: 1
  eval_every: 2
  eval_prompts: 8
rollout:
  max_prompt_tokens: 64
  max_tokens: 16
  shard_size: 4
"""


def write_rows(folder: Path) -> dict[str, str]:
    """Files of SFT, preference and prompt rows; their config keys and paths."""
    rows: dict[str, list[dict[str, str]]] = {"sft": [], "preferences": [], "prompts": []}
    for text in TEXTS:
        question, _, answer = text.partition(" Answer: ")
        rows["sft"].append({"prompt": question, "completion": answer})
        rows["preferences"].append({"prompt": question, "chosen": answer, "rejected": "no idea"})
        rows["prompts"].append({"prompt": question})
    keys = {}
    for name, lines in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        keys[f"data.{name}.path"] = str(path)
    return keys


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def check_ppo(run: Path, gap: float) -> None:
    """Check two iterations: the learner agrees with their samples, and they moved the policy."""
    summary = json.loads((run / "ppo" / "summary.json").read_text(encoding="utf-8"))
    assert summary["iterations"] == summary["adapter_version"] == 2
    assert summary["samples_generated"] == summary["samples_learnt"] == 16
    records = read_lines(run / "ppo" / "metrics.jsonl")
    assert [record["policy/version"] for record in records] == [1, 2]
    assert all(record["sampler/gap_mean"] < gap for record in records), records
    assert records[1]["objective/kl"] != 0


def arguments(folder: Path, base: str) -> tuple[str, ...]:
    """A config's file in a folder, and the keys of a run on a base."""
    config = folder / "run.yaml"
    config.write_text(RUN, encoding="utf-8")
    data = (f"{key}={path}" for key, path in write_rows(folder).items())
    return str(config), f"run.dir={folder / 'run'}", f"model.path={base}", *data


SUPERVISED = ("cluster.mode=inline", "run.stages=[sft,reward]")


def train(folder: Path, base: str, *keys: str) -> Path:
    """Train on a base, every stage in this process."""
    file, *given = arguments(folder, base)
    config = load(file, [*given, *SUPERVISED, *keys])
    pipeline.run(config)
    ppo.run(config)
    return folder / "run"


def check_exports(run: Path) -> None:
    """Adapter and merged model say the same, to libraries that know nothing of the run."""
    config = load(run / "config.yaml", [])
    ids_BS = torch.arange(20, 60).view(2, 20)
    logits = []
    kinds: tuple[tuple[export.Kind, Any], ...] = (
        ("adapter", AutoPeftModelForCausalLM),
        ("merged", AutoModelForCausalLM),
    )
    for kind, auto in kinds:
        folder = Path(export.run(config, kind=kind)["folder"])
        assert AutoTokenizer.from_pretrained(folder).chat_template
        assert "| ppo | trained in this run | " in (folder / "README.md").read_text()
        with torch.no_grad():
            logits.append(auto.from_pretrained(folder).eval()(ids_BS).logits)
    base = AutoModelForCausalLM.from_pretrained(run / "sft" / "model").eval()
    with torch.no_grad():
        assert (base(ids_BS).logits - logits[0]).abs().max() > 1e-3
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_every_stage(tmp_path: Path, family: Family) -> None:
    run = train(tmp_path, build(family, tmp_path / "base"))
    check_ppo(run, gap=1e-4)
    check_exports(run)


QUANTISED = (
    "policy.gradient_checkpointing=true",
    "critic.gradient_checkpointing=true",
    "rollout.max_gap=0.3",
)
"""The engine serves the base as it is, so the learner's rounding shows in the gap."""


def test_an_int8_base_goes_through_every_stage(tmp_path: Path) -> None:
    base = build("llama-3", tmp_path / "base")
    run = train(tmp_path, base, "model.quantization=int8", *QUANTISED)
    check_ppo(run, gap=0.3)


def test_an_nf4_base_goes_through_every_stage_on_ray(
    command_line: "CommandLine", tmp_path: Path
) -> None:
    file, *given = arguments(tmp_path, build("llama-3", tmp_path / "base"))
    given += ["model.quantization=nf4", *QUANTISED]
    pipeline.run(load(file, [*given, *SUPERVISED]))
    command_line.run("run", file, *given, "run.stages=[ppo]")
    check_ppo(tmp_path / "run", gap=0.3)
    command_line.wait_until_nothing_left()
