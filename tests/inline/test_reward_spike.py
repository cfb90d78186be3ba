"""A reward that is a hundred times too large for one iteration, on a tiny model."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import vowels
from vowels import records

from rlhf_ray.config import Config
from rlhf_ray.stages import pipeline

SPIKE, ITERATIONS = 7, 18
REWARD = """
calls = 0

def vowels(completions, **columns):
    global calls
    calls += 1
    factor = 100.0 if calls == {call} else 1.0
    return [factor * sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
"""


def run(folder: Path, model: str, call: int) -> Config:
    """A run whose reward jumps in one call: an iteration is one, the evaluation before them too."""
    folder.mkdir()
    (folder / "mine.py").write_text(REWARD.format(call=call))
    config = vowels.make_config(
        folder,
        model,
        critic={"learning_rate": 1e-2},
        rollout={"shard_size": 32},
        guards={"loss_spike": {"action": "rollback"}},
        ppo={
            "iterations": ITERATIONS,
            "batch_size": 32,
            "mini_batch_size": 32,
            "learning_rate": 2e-2,
            "kl_coef": 0.01,
            "kl_target": None,
            "eval_every": 1000,
            "save_every": 1,
            "keep_checkpoints": ITERATIONS,
        },
    )
    pipeline.run(config)
    return config


def test_a_hundredfold_reward_is_survived(tmp_path: Path, model: str) -> None:
    clean = run(tmp_path / "clean", model, call=0)
    spiked = run(tmp_path / "spiked", model, call=SPIKE + 1)
    without, found = records(clean), records(spiked)
    assert found[SPIKE - 1]["objective/scores"] > 50 * without[SPIKE - 1]["objective/scores"]
    aside = [record["episode_set_aside"] for record in found]
    assert aside == [0] * (SPIKE - 1) + [32] * (ITERATIONS - SPIKE + 1)
    checkpoints = Path(spiked.run.dir) / "checkpoints"
    for file in ("policy/learner.safetensors", "critic/learner.safetensors"):
        before, after, later = (
            (checkpoints / str(version) / file).read_bytes()
            for version in (SPIKE - 1, SPIKE, SPIKE + 1)
        )
        assert after == before != later
    # The critic knows nothing of it: its loss is the usual one again at once.
    assert found[SPIKE]["loss/value_avg"] < 3 * found[SPIKE - 2]["loss/value_avg"]

    def last(name: str, history: list[dict[str, Any]]) -> float:
        return fmean(record[name] for record in history[-5:])

    assert last("objective/scores", without) > without[0]["objective/scores"] + 0.08
    assert last("objective/scores", found) > 0.8 * last("objective/scores", without)
    assert last("objective/kl", found) < 1.5 * last("objective/kl", without)
    summary = json.loads((Path(spiked.run.dir) / "ppo" / "summary.json").read_text())
    assert summary["guards"]["loss_spike"] == 1
    assert summary["samples_generated"] == summary["samples_learnt"] + 32 == 32 * ITERATIONS
