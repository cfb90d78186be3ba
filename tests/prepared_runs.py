"""Runs of supervised stages: tiny configs, and run folders as the stage prepare leaves them."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from rlhf_ray.config import Config, resolve

WORDS = ("red", "blue", "green", "black", "white")
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 1,
    "num_heads": 2,
}


def config_values(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """An inline config of few steps on a tiny model; ``sections`` go on top, key by key."""
    values: dict[str, Any] = {
        "run": {"dir": str(folder)},
        "cluster": {"mode": "inline"},
        "rollout": {"engine": "transformers", "max_prompt_tokens": 32, "max_tokens": 32},
        "model": {"max_length": 64, "tiny": TINY},
        "pretrain": {"steps": 6, "batch_size": 4, "block_size": 32, "learning_rate": 0.01},
        "sft": {"steps": 30, "batch_size": 4, "block_size": 32, "learning_rate": 0.01},
        "reward": {"steps": 30, "batch_size": 8, "learning_rate": 0.02, "eval_rows": 15},
    }
    for name, keys in sections.items():
        values[name] = values.get(name, {}) | keys
    return values


def make_config(folder: Path, **sections: dict[str, Any]) -> Config:
    """The same, read and checked."""
    return resolve(config_values(folder, **sections))


def write_prepared(folder: Path) -> None:
    """Sets of prepare: good answers say thanks, bad ones do not."""
    answers, pairs = [], []
    for index in range(120):
        word = WORDS[index % len(WORDS)]
        question = {"question_id": index, "question": f"{word}?", "prompt": f"Q: {word}?\n\nA: "}
        good, bad = f"{word} {word}, thanks", f"no {word}"
        answers.append(question | {"completion": good, "score": 2, "preferred": True})
        answers.append(question | {"completion": bad, "score": 0, "preferred": False})
        pairs.append(question | {"chosen": good, "rejected": bad})
    for name, rows in {
        "finetune": answers,
        "reward": pairs[:100],
        "evaluation": pairs[100:],
    }.items():
        Dataset.from_list(rows).save_to_disk(str(folder / "prepare" / name))
