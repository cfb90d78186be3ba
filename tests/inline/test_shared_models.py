"""Roles that share a model: the same run, whoever holds it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config import Config, resolve
from rlhf_ray.config.model import LoraConfig, ModelConfig, TinyModelConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import tiny
from rlhf_ray.models.adapters import attach
from rlhf_ray.models.loading import (
    load_causal_lm,
    load_sequence_classifier,
    load_tokenizer,
    save_adapter,
    save_model,
)
from rlhf_ray.stages import ppo

REWARD = """
def vowels(completions, **columns):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama whose output layer can tell tokens apart."""
    folder = tmp_path_factory.mktemp("models") / "base"
    shape = TinyModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_heads=2, num_layers=1
    )
    tiny.build(folder, ["Ask me one thing", "an answer of some words"], shape, 64, seed=0)
    causal_lm = load_causal_lm(str(folder), ModelConfig())
    with torch.no_grad():
        causal_lm.lm_head.weight.mul_(10)
    save_model(causal_lm, load_tokenizer(str(folder)), folder)
    return str(folder)


def make_config(folder: Path, model: str, **sections: dict[str, Any]) -> Config:
    """Three iterations of eight rollouts in one process, with a reward to be learnt."""
    folder.mkdir()
    (folder / "mine.py").write_text(REWARD)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Ask {i}: "}) + "\n" for i in range(20)))
    values: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "stages": ["ppo"]},
        "cluster": {"mode": "inline"},
        "model": {"path": model, "max_length": 64},
        "data": {"prompts": {"path": str(prompts)}},
        "rewards": [{"type": "function", "function": f"{folder}/mine.py:vowels"}],
        "rollout": {"engine": "transformers", "max_prompt_tokens": 32, "max_tokens": 12},
        "ppo": {
            "iterations": 3,
            "batch_size": 8,
            "mini_batch_size": 8,
            "epochs": 2,
            "learning_rate": 3e-2,
            "eval_every": 2,
            "eval_prompts": 8,
        },
    }
    return resolve(values | sections)


def metrics(config: Config) -> list[dict[str, float]]:
    """What each iteration logged, without times."""
    lines = (Path(config.run.dir) / "ppo" / "metrics.jsonl").read_text().splitlines()
    return [
        {
            k: v
            for k, v in json.loads(line).items()
            if not k.startswith(("timing_s/", "throughput/"))
        }
        for line in lines
    ]


def test_a_reference_that_is_the_policys_base_changes_nothing(model: str, tmp_path: Path) -> None:
    own = make_config(tmp_path / "own", model)
    shared = make_config(tmp_path / "shared", model, reference={"kind": "policy_base"})
    summaries = [ppo.run(config) for config in (own, shared)]
    assert metrics(own) == metrics(shared)
    assert summaries[0]["kl_last"] == summaries[1]["kl_last"]
    assert max(record["objective/kl"] for record in metrics(own)) > 0.01  # the policy did move
    traced = [(Path(c.run.dir) / "trace.json").read_text() for c in (own, shared)]
    assert ["reference-0" in text for text in traced] == [True, False]


class TestCriticFromTheRewardModel:
    def test_it_learns_with_rewards_of_another_source(self, model: str, tmp_path: Path) -> None:
        classifier = load_sequence_classifier(model, ModelConfig(), seed=5)
        wrapped = attach(classifier, LoraConfig(r=2), "SEQ_CLS", seed=3, dropout=0.0)
        save_adapter(wrapped, load_tokenizer(model), tmp_path / "reward", model)
        critic = {"init": "reward", "learning_rate": 1e-2}
        reward = {"path": str(tmp_path / "reward")}
        config = make_config(tmp_path / "run", model, critic=critic, reward=reward)
        zero = make_config(tmp_path / "zero", model, critic={"learning_rate": 1e-2})
        for each in (config, zero):
            ppo.run(each)
        # Both see the same first responses; what they expect of them differs.
        first, other = metrics(config)[0], metrics(zero)[0]
        assert first["objective/scores"] == other["objective/scores"]
        assert first["loss/value_avg"] != pytest.approx(other["loss/value_avg"], rel=0.01)
        committed = Path(config.run.dir) / "checkpoints" / "latest" / "critic"
        assert "score" in "".join(load_file(committed / "adapter_model.safetensors"))

    def test_it_needs_a_reward_model(self, model: str, tmp_path: Path) -> None:
        config = make_config(tmp_path / "run", model, critic={"init": "reward"})
        with pytest.raises(ConfigError, match=r"run the stage reward, or set reward.path"):
            ppo.run(config)

    def test_it_reads_the_policys_tokens(self, model: str, tmp_path: Path) -> None:
        shape = TinyModelConfig(vocab_size=310, hidden_size=32, num_heads=2, num_layers=1)
        tiny.build(tmp_path / "other", ["quite other words"], shape, 64, seed=0)
        path = str(tmp_path / "other")
        config = make_config(
            tmp_path / "run", model, critic={"init": "reward"}, reward={"path": path}
        )
        with pytest.raises(DataError, match=r"cannot be the critic: its tokenizer is not the pol"):
            ppo.run(config)
