"""A run's folder with recorded samples, curves, evaluations and warnings, as PPO leaves it."""

import json
import math
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.observability.samples.writing import SampleWriter

HOSTILE = (
    '<script>document.title = "taken"</script> \x1b[31mred\x1b[0m \u202egnitirw\u202c & "quoted"'
)
"""A response that acts on a page, a terminal or the direction of a text, if it is let."""
TEXT = "sort a list in Python with sorted and key= then reverse it ; thanks for asking"
WORDS = TEXT.split()


def record_run(folder: Path, iterations: int, samples: int = 8, tokens: int = 2) -> Path:
    """Write a run's folder; sample 3 of each iteration is hostile."""
    drawn, stage = random.Random(0), folder / "ppo"
    (folder / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("run: {name: recorded}\n")
    writer = SampleWriter(stage, ["model", "length"], -1)
    for iteration in range(1, iterations + 1):
        writer.append([_sample(drawn, iteration, row, row < tokens) for row in range(samples)])
    writer.close()
    _write(stage / "metrics.jsonl", (_metrics(drawn, i, iterations) for i in range(1, iterations)))
    every = max(1, iterations // 10)
    _write(stage / "eval.jsonl", (_evaluation(i) for i in range(0, iterations + 1, every)))
    warned = {
        "guard": "repetition",
        "action": "warn",
        "text": "31% of the responses repeat a token 4 times or more in a row (bound 20%)",
    }
    _write(stage / "warnings.jsonl", ({"iteration": i, **warned} for i in (2, iterations)))
    return folder


def _sample(drawn: random.Random, iteration: int, row: int, has_tokens: bool) -> dict[str, Any]:
    words = [f"{word} " for word in drawn.choices(WORDS, k=drawn.randint(12, 60))]
    score, length = drawn.gauss(iteration**0.3, 1), len(words)
    sample = {
        "iteration": iteration,
        "version": iteration - 1,
        "position": row,
        "prompt_id": str(row // 2),
        "prompt": f"Question: how do I sort list number {row // 2}?\n\nAnswer: ",
        "response": HOSTILE if row == 3 else "".join(words),
        "score": score,
        "scores": {"model": score, "length": length / 60},
        "kl": drawn.expovariate(0.2),
        "mismatch": 0.002,
        "distinct_bigrams": drawn.random(),
        "length": length,
        "finish_reason": "stop" if row % 3 else "length",
    }
    if has_tokens:
        sample["tokens"] = {
            "ids": [WORDS.index(word.strip()) for word in words],
            "texts": words,
            "advantage": [round(drawn.gauss(0, 1), 4) for _ in words],
            "kl": [round(drawn.gauss(0, 0.3), 4) for _ in words],
            "mismatch": [round(drawn.gauss(0, 0.004), 4) for _ in words],
        }
    return sample


def _metrics(drawn: random.Random, iteration: int, iterations: int) -> dict[str, float]:
    done = iteration / iterations
    return {
        "iteration": iteration,
        "objective/scores": 2 * math.tanh(3 * done) + drawn.gauss(0, 0.1),
        "objective/kl": 6 * done + drawn.gauss(0, 0.3),
        "response_length/mean": 30 + 10 * done + drawn.gauss(0, 2),
    }


def _evaluation(iteration: int) -> dict[str, Any]:
    prompts = [f"Question: how do I sort list number {number}?\n\nAnswer: " for number in range(4)]
    rows = [
        {"prompt": prompt, "response": f"Use sorted(), take {iteration}.", "score": iteration / 10}
        for prompt in prompts
    ]
    return {
        "iteration": iteration,
        "version": iteration,
        "eval/score": iteration / 10,
        "samples": rows,
    }


def _write(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
