"""What the runs read: a tiny model, prompts, a reward, and one config for all."""

import json
from pathlib import Path
from typing import Any

import yaml

BATCH_SIZE = 16
QUESTIONS = [
    f"Question: why does the {noun} {verb}?"
    for noun in ("kettle", "grinder", "filter", "pump")
    for verb in ("leak", "whistle", "stop", "hum")
]
REWARD = """
def even(prompts, completions, **columns):
    return [sum(ord(c) % 2 == 0 for c in text) / (len(text) + 1) for text in completions]
"""
NUM_ROLES = 7
"""Actors of a run, each of a logical CPU."""


def prepare(folder: Path) -> Path:
    """Write all that the runs read into a folder; return the config's file."""
    from rlhf_ray.config.model import TinyModelConfig
    from rlhf_ray.models import tiny

    shape = TinyModelConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2)
    tiny.build(folder / "model", QUESTIONS, shape, max_length=512, seed=0)
    rows = [json.dumps({"prompt": question}) + "\n" for question in QUESTIONS]
    (folder / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(_config(folder)), encoding="utf-8")
    return config


def _config(folder: Path) -> dict[str, Any]:
    """Every role in a process of its own; two of the generators and of the policy's ranks."""
    loopback = {"VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    return {
        "run": {"name": "chaos", "stages": ["ppo"]},
        "cluster": {
            "dashboard": False,
            "env": loopback,
            "max_role_restarts": 100,
            "max_group_restarts": 100,
        },
        "placement": {"gpus": 0},
        "model": {"path": str(folder / "model"), "max_length": 128},
        "sft": {"path": str(folder / "model")},
        "critic": {"init": "sft", "learning_rate": 1e-3},
        "policy": {"num_ranks": 2},
        "data": {"prompts": {"path": str(folder / "prompts.jsonl")}},
        "lora": {"r": 8},
        "rewards": [{"type": "function", "function": f"{folder / 'reward.py'}:even"}],
        "generators": {"num": 2, "max_restarts": 100},
        "rollout": {"max_prompt_tokens": 64, "max_tokens": 32, "shard_size": 4},
        "ppo": {
            "batch_size": BATCH_SIZE,
            "mini_batch_size": 8,
            "learning_rate": 1e-3,
            "eval_prompts": 8,
            "eval_every": 1,
        },
    }
