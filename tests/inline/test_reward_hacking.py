"""A tiny model games its reward without a KL penalty, and not with one: the guard sees it."""

import json
from pathlib import Path
from statistics import fmean

import pytest
import vowels
from vowels import records

from rlhf_ray.stages import pipeline


@pytest.mark.parametrize(("kl_coef", "is_gamed"), [(0.0, True), (0.2, False)])
def test_repetition_is_seen_where_the_reward_is_gamed(
    tmp_path: Path, model: str, kl_coef: float, is_gamed: bool
) -> None:
    """The more vowels the better: without a penalty the policy ends in runs of them."""
    config = vowels.make_config(
        tmp_path / "run",
        model,
        critic={"learning_rate": 1e-2},
        ppo={
            "iterations": 18,
            "batch_size": 32,
            "mini_batch_size": 32,
            "kl_coef": kl_coef,
            "kl_target": None,
            "eval_every": 1000,
        },
    )
    pipeline.run(config)
    summary = json.loads((Path(config.run.dir) / "ppo" / "summary.json").read_text())
    last = records(config)[-5:]
    repeating = fmean(record["response/repeating_share"] for record in last)
    distinct = fmean(record["response/distinct_bigrams"] for record in last)
    if is_gamed:
        assert repeating > 0.3
        assert distinct < 0.8
        assert summary["guards"]["repetition"] >= 5
    else:
        assert repeating < 0.02
        assert distinct > 0.98
        assert summary["guards"]["repetition"] == 0
