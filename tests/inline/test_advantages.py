"""Every advantage estimator through a PPO stage on a tiny model, with a reward to be learnt."""

import json
from pathlib import Path
from typing import Any

import pytest
import vowels
from vowels import records

from rlhf_ray.config import Config
from rlhf_ray.stages import pipeline

ADVANTAGE = """
import torch
def centred(rewards_BT, mask_BT, *, values_BT, gamma):
    to_go = rewards_BT.flip(1).cumsum(1).flip(1)
    return (to_go - values_BT) * mask_BT
"""

NUM_ITERATIONS = 20
"""Enough for the reward to rise by three times the bound, whichever prompts are drawn first."""


def make_config(folder: Path, model: str, iterations: int, **ppo: Any) -> Config:
    """Iterations of 32 rollouts, four of a prompt."""
    batch = {"batch_size": 32, "mini_batch_size": 32, "samples_per_prompt": 4}
    kl = {"kl_coef": 0.01, "kl_target": None}
    often = {"save_every": 1, "eval_every": 1000}
    return vowels.make_config(
        folder,
        model,
        critic={"learning_rate": 1e-2},
        ppo={"iterations": iterations, **batch, **kl, **often, **ppo},
    )


@pytest.mark.parametrize(
    "ppo",
    [
        pytest.param({"advantage": "rloo"}, id="rloo"),
        pytest.param(
            {"advantage": "grpo", "kl_in": "loss", "kl_estimator": "k3"}, id="grpo, KL in the loss"
        ),
        pytest.param({"advantage": "reinforce"}, id="reinforce"),
        pytest.param({"score_position": "first_pad"}, id="gae, score behind the last token"),
    ],
)
def test_the_reward_rises(tmp_path: Path, model: str, ppo: dict[str, Any]) -> None:
    config = make_config(tmp_path, model, NUM_ITERATIONS, **ppo)
    pipeline.run(config)
    summary = json.loads((Path(config.run.dir) / "ppo" / "summary.json").read_text())
    assert summary["reward_last"] > summary["reward_first"] + 0.05
    assert summary["samples_generated"] == summary["samples_learnt"] == NUM_ITERATIONS * 32
    has_critic = ppo.get("advantage", "gae") == "gae"
    assert ("loss/value_avg" in records(config)[0]) == has_critic
    folder = Path(config.run.dir) / "checkpoints" / "latest"
    assert (folder / "policy" / "adapter_model.safetensors").is_file()
    assert (folder / "critic").is_dir() == has_critic


@pytest.mark.parametrize("advantage", ["rloo", "mine.py:centred"])
def test_a_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, model: str, advantage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(ADVANTAGE)
    ppo = {"advantage": advantage, "kl_target_per_token": 0.05, "kl_horizon": 100}
    whole = make_config(tmp_path / "whole", model, 3, **ppo)
    pipeline.run(whole)
    pipeline.run(make_config(tmp_path / "stopped", model, 2, **ppo))
    resumed = make_config(tmp_path / "stopped", model, 3, **ppo)
    pipeline.run(resumed)
    for one, other in zip(records(whole), records(resumed), strict=True):
        for name, value in one.items():
            if not name.startswith(("timing_s/", "throughput/", "generators/")):
                assert other[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    coefs = [record["objective/kl_coef"] for record in records(whole)]
    assert coefs[0] == 0.01
    # The controller looks at nats a token: every change is n / horizon times at most .2.
    for record, coef, following in zip(records(whole), coefs, coefs[1:], strict=False):
        error = min(max(record["objective/kl_per_token"] / 0.05 - 1, -0.2), 0.2)
        assert following == pytest.approx(coef * (1 + error * 32 / 100), rel=1e-6)
