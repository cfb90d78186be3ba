"""A PPO run on a tiny model in one process, paid for vowels: a reward that is learnt in seconds."""

import json
from pathlib import Path
from typing import Any

from rlhf_ray.config import Config, resolve

TEXTS = ["Ask me one thing", "an answer of some words"]
"""What the model's tokenizer is trained on."""
REWARD = """
def vowels(completions, **columns):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
"""


def make_config(folder: Path, model: str, **sections: dict[str, Any]) -> Config:
    """Three iterations; sections go on top, key by key.

    ``folder`` gets the prompts and ``mine.py`` with the reward, unless that is there already.
    """
    folder.mkdir(exist_ok=True)
    code, prompts = folder / "mine.py", folder / "prompts.jsonl"
    if not code.exists():
        code.write_text(REWARD)
    prompts.write_text("".join(json.dumps({"prompt": f"Ask {i}: "}) + "\n" for i in range(40)))
    values: dict[str, Any] = {
        "run": {"dir": str(folder / "run"), "stages": ["ppo"]},
        "cluster": {"mode": "inline"},
        "model": {"path": model, "max_length": 64},
        "data": {"prompts": {"path": str(prompts)}},
        "rewards": [{"type": "function", "function": f"{code}:vowels"}],
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
    for name, keys in sections.items():
        values[name] = values.get(name, {}) | keys
    return resolve(values)


def records(config: Config) -> list[dict[str, Any]]:
    """Return each iteration's metrics."""
    path = Path(config.run.dir) / "ppo" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
