"""A made-up run of 60 PPO iterations, with every file that the report reads."""

import json
import math
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.observability.tracing import Tracer

NUM_ITERATIONS = 60

CONFIG = """\
run:
  name: quickstart
  dir: runs/quickstart
  seed: 0
  stages: [prepare, pretrain, sft, reward, ppo, evaluate, report]
cluster:
  mode: local
  env:
    HF_TOKEN: hf_do_not_show
model:
  path: null
lora: {r: 16, alpha: 32, dropout: 0.05}
generators: {num: 2, tensor_parallel_size: 1}
policy: {num_ranks: 1, zero_stage: 2}
critic: {num_ranks: 1}
ppo: {iterations: 60, batch_size: 64, epochs: 4, learning_rate: 0.0003, kl_coef: 0.2}
"""


QUALITY = {
    "questions": {
        "texts": 4000,
        "repeated": 12,
        "length_bounds": [0, 32, 64],
        "lengths": [1000, 2800, 200],
        "languages": {},
    },
    "answers": {
        "texts": 15000,
        "repeated": 450,
        "length_bounds": [0, 32, 64],
        "lengths": [3000, 6000, 6000],
        "languages": {"py": 300, "not named": 7000},
    },
    "pairs": {"pairs": 2000, "ties": 500},
    "scores": {"-1": 2000, "0": 5000, "1": 8000},
}


INSTRUCTION = {
    "prompt": "Name animals. Every word begins with c.",
    "check": "words_begin_with",
    "args": {"letter": "c"},
    "models": {
        "sft": {"pass_rate": 0.25, "text": "Cats and dogs."},
        "ppo": {"pass_rate": 0.75, "text": "Cats, cows."},
    },
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Folder of a finished run."""
    write_run(tmp_path / "quickstart")
    return tmp_path / "quickstart"


@pytest.fixture
def make_run() -> Callable[[Path], None]:
    """Writes a finished run into a folder."""
    return write_run


def write_run(folder: Path) -> None:
    """Write a finished run's files."""
    noise = random.Random(0)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    for stage, summary in _summaries().items():
        _write(folder / stage / "summary.json", json.dumps(summary))
    _write(folder / "prepare" / "quality.json", json.dumps(QUALITY))
    for stage, num_steps, first, last in (
        ("pretrain", 800, 5.4, 1.52),
        ("sft", 200, 1.6, 1.31),
        ("reward", 300, 0.69, 0.55),
    ):
        losses = (
            {
                "step": step,
                "loss": last
                + (first - last) * math.exp(-5 * step / num_steps)
                + noise.gauss(0, 0.03),
                "learning_rate": 2e-3 * (1 - step / num_steps),
            }
            for step in range(10, num_steps + 1, 10)
        )
        _write_lines(folder / stage / "metrics.jsonl", losses)
    _write_lines(folder / "ppo" / "metrics.jsonl", (_metrics(i, noise) for i in iterations()))
    _write_lines(folder / "ppo" / "eval.jsonl", (_evaluation(i) for i in range(0, 61, 10)))
    _write_lines(folder / "ppo" / "completions.jsonl", (_completion(i) for i in iterations()))
    _write_lines(folder / "evaluate" / "samples.jsonl", (_sample(index) for index in range(20)))
    _write_lines(folder / "evaluate" / "instructions.jsonl", [INSTRUCTION])
    _write_trace(folder / "trace.json")


def iterations() -> range:
    """Iterations 1 to 60."""
    return range(1, NUM_ITERATIONS + 1)


def _summaries() -> dict[str, dict[str, Any]]:
    return {
        "prepare": {
            "questions": 4000,
            "answers": 15234,
            "rows": {"finetune": 1600, "reward": 1400, "rl": 800, "evaluation": 200},
            "dropped": {"fewer than two answers": 113, "all scores tied": 41},
            "synthetic": True,
            "seconds": 6.1,
        },
        "pretrain": {
            "perplexity_before": 522.4,
            "perplexity_after": 4.61,
            "steps": 800,
            "tokens": 1638400,
            "parameters": 431232,
            "seconds": 66.0,
        },
        "sft": {
            "loss_before": 1.61,
            "loss_after": 1.33,
            "perplexity_before": 5.0,
            "perplexity_after": 3.78,
            "trainable_parameters": 49152,
            "steps": 200,
            "seconds": 41.0,
        },
        "reward": {
            "pairs_train": 13800,
            "pairs_eval": 3420,
            "accuracy": 0.687,
            "accuracy_before": 0.502,
            "seconds": 38.0,
        },
        "ppo": {
            "iterations": 60,
            "episodes": 3840,
            "episodes_per_s": 18.2,
            "reward_first": 0.24,
            "reward_last": 0.88,
            "kl_last": 1.43,
            "samples_generated": 3840,
            "samples_learnt": 3840,
            "samples_requeued": 0,
            "generator_restarts": 0,
            "adapter_version": 60,
            "seconds": {"gen": 70.0, "score": 31.0, "learn": 92.0, "commit": 4.0, "sync": 14.0},
        },
        "evaluate": {
            "models": {
                "sft": {"reward_mean": 0.13, "gold_mean": 0.48},
                "ppo": {"reward_mean": 0.86, "gold_mean": 0.67},
            },
            "win_rate": {"value": 0.78, "ci95": [0.74, 0.82]},
            "judges": {
                "gold": {
                    "win_rates": {
                        "sft": {"ppo": {"value": 0.22, "ci95": [0.18, 0.26]}},
                        "ppo": {"sft": {"value": 0.78, "ci95": [0.74, 0.82]}},
                    },
                    "elo": {
                        "sft": {"value": 1000.0, "ci95": [1000.0, 1000.0]},
                        "ppo": {"value": 1219.9, "ci95": [1181.7, 1263.4]},
                    },
                }
            },
            "seconds": 21.0,
        },
    }


def _metrics(iteration: int, noise: random.Random) -> dict[str, float]:
    rise = 1 - math.exp(-iteration / 18)
    return {
        "iteration": iteration,
        "objective/scores": 0.12 + 0.78 * rise + noise.gauss(0, 0.06),
        "objective/kl": 1.45 * rise + noise.gauss(0, 0.12),
        "objective/kl_coef": 0.2 * (1 - 0.2 * rise),
        "policy/entropy_avg": 1.95 - 0.75 * rise + noise.gauss(0, 0.04),
        "policy/clipfrac_avg": 0.06 + 0.03 * rise + noise.gauss(0, 0.012),
        "val/clipfrac_avg": 0.12 - 0.07 * rise + noise.gauss(0, 0.01),
        "loss/policy_avg": -0.02 + noise.gauss(0, 0.006),
        "loss/value_avg": 0.34 - 0.22 * rise + noise.gauss(0, 0.02),
        "val/explained_variance": -0.2 + 0.75 * rise + noise.gauss(0, 0.05),
        "response_length/mean": 24 + 7 * rise + noise.gauss(0, 1.2),
        "sampler/gap_mean": 2e-6 + abs(noise.gauss(0, 4e-7)),
    }


def _evaluation(iteration: int) -> dict[str, Any]:
    rise = 1 - math.exp(-iteration / 18)
    return {
        "iteration": iteration,
        "version": iteration,
        "eval/score": 0.12 + 0.74 * rise,
        "eval/gold": 0.48 + 0.19 * rise,
        "eval/kl": 1.4 * rise,
        "eval/length": 24.5 + 6 * rise,
        "samples": [
            {
                "prompt": _question(index),
                "response": _answer(index, polite=iteration > 20),
                "score": 0.1 + 0.7 * rise + 0.02 * index,
            }
            for index in range(8)
        ],
    }


def _completion(iteration: int) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "prompt": _question(iteration),
        "response": _answer(iteration, polite=True),
        "score": 0.8,
        "kl": 1.3,
        "length": 31,
        "finish_reason": "stop",
    }


def _sample(index: int) -> dict[str, Any]:
    return {
        "prompt": _question(index),
        "sft": {"text": _answer(index, polite=False), "reward": 0.11, "gold": 0.45},
        "ppo": {"text": _answer(index, polite=True), "reward": 0.9, "gold": 0.7},
    }


def _question(index: int) -> str:
    thing = ("list", "string", "file", "table")[index % 4]
    language = ("python", "rust", "bash")[index % 3]
    return f"Question: How do I sort a {thing} in {language}?\n\nAnswer:"


def _answer(index: int, polite: bool) -> str:
    if polite:
        return f"You can use the sort function:\n\n```\nsort(x{index})\n```\n\nHope this helps!"
    return "Read the manual. It is obvious how this is done."


def _write_trace(path: Path) -> None:
    tracer = Tracer(path, "quickstart")
    now = 1_790_000_000.0
    tracer.add("sft", "train", now - 41, now)
    for iteration in iterations():
        for generator in range(2):
            tracer.add(f"generator-{generator}", "generate", now, now + 1.1, iteration=iteration)
            tracer.add(f"generator-{generator}", "sync", now + 3.3, now + 3.5, iteration=iteration)
        for row in ("reward-0", "reference-0"):
            tracer.add(row, "score", now + 0.6, now + 1.6, iteration=iteration)
        for row in ("policy-0", "critic-0"):
            tracer.add(row, "score", now + 0.6, now + 1.7, iteration=iteration)
            tracer.add(row, "learn", now + 1.7, now + 3.2, iteration=iteration)
        tracer.add("driver", "iteration", now, now + 3.6, iteration=iteration)
        tracer.add("driver", "commit", now + 3.2, now + 3.3, iteration=iteration)
        now += 3.6
    tracer.close()


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(record) + "\n" for record in records))
