"""What is rehearsed, and what a plan makes of it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import Config, dump, resolve
from rlhf_ray.errors import ConfigError
from rlhf_ray.stages.plan import plan_for
from rlhf_ray.stages.plan.pace import Pace
from rlhf_ray.stages.plan.rehearsal import RESULT, Rehearsal, as_text, calibrated, load
from rlhf_ray.stages.rehearse import is_needed, worst_case

SHAPE = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 300,
}


def config_of(folder: Path, **sections: Any) -> Config:
    return resolve(
        {
            "run": {"dir": str(folder), "stages": ["ppo"]},
            "model": {"path": "base"},
            "ppo": {"iterations": 100, "save_every": 10, "missing_eos_penalty": 1.0},
            "rollout": {"length_sampler": {"min": 2, "max": 9}},
            "rewards": [
                {"type": "model"},
                {"type": "function", "name": "mine", "function": "mine:reads_columns"},
            ],
            **sections,
        }
    )


def rehearsal_of(config: Config) -> Rehearsal:
    return Rehearsal(
        when="today",
        config=dump(config),
        seconds={"gen": 4.0, "save": 20.0},
        peak_memory_bytes={"policy-0": 2 * 10**9, "policy-1": 3 * 10**9, "generator-0": 10**9},
        samples=16,
        generator_restarts=1,
    )


def test_the_worst_case_is_the_longest_that_the_config_allows(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    worst = worst_case(config)
    assert worst.run.dir == str(tmp_path / "run" / "rehearsal")
    assert worst.run.stages == ["ppo"]
    assert (worst.ppo.iterations, worst.ppo.save_every, worst.ppo.eval_every) == (2, 1, 2)
    assert worst.rollout.ignore_eos
    assert worst.rollout.length_sampler is None
    assert worst.rollout.max_tokens == config.rollout.max_tokens
    assert worst.data.overlong == "truncate"
    assert worst.ppo.batch_size == config.ppo.batch_size
    assert (worst.sft.path, worst.reward.path) == ("base", "base")  # until there are better ones


def test_only_scores_by_models_are_asked_for(tmp_path: Path) -> None:
    assert [s.type for s in worst_case(config_of(tmp_path)).rewards] == ["model"]
    asks = {"type": "function", "name": "mine", "function": "mine:reads_columns"}
    (source,) = worst_case(config_of(tmp_path, rewards=[asks])).rewards
    assert source.function == "rlhf_ray.stages.rehearse:length"


def test_without_a_model_or_ppo_there_is_nothing_to_rehearse(tmp_path: Path) -> None:
    for sections, says in (
        ({"model": {"path": None}}, "sft.path or model.path"),
        ({"run": {"dir": str(tmp_path), "stages": ["report"]}}, "run.stages does not name it"),
    ):
        config = config_of(tmp_path, **sections)
        assert not is_needed(config)
        with pytest.raises(ConfigError, match=says):
            worst_case(config)


def test_a_rehearsal_holds_for_its_own_config_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert is_needed(config)
    (tmp_path / RESULT).write_text(json.dumps(asdict(rehearsal_of(config))))
    assert load(config) == rehearsal_of(config)
    assert not is_needed(config)
    more = config.model_copy(update={"ppo": config.ppo.model_copy(update={"iterations": 9})})
    assert load(more) is not None
    longer = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"max_tokens": 7})}
    )
    assert load(longer) is None
    assert is_needed(longer)


def test_measured_seconds_are_the_worst_case_and_scale_the_best(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    predicted = Pace({"gen": (1.0, 2.0), "save": (0.1, 1.0)}, (1.0, 2.0), idle_gpu_hours=6.0)
    found = calibrated(predicted, rehearsal_of(config), config)
    # Four seconds instead of two; a save of 20 s every tenth iteration.
    assert found.phases == {"gen": (2.0, 4.0), "save": (0.2, 2.0)}
    # 100 iterations of 2.2 instead of 1.1 s, and of 6 instead of 3 s.
    day = 86_400
    assert found.days == pytest.approx((1 + 110 / day, 2 + 300 / day))
    assert found.idle_gpu_hours == pytest.approx(6.0 * 8.2 / 4.1)
    unknown = calibrated(None, rehearsal_of(config), config)
    assert unknown.phases == {"gen": (4.0, 4.0), "save": (2.0, 2.0)}
    assert unknown.days == pytest.approx((600 / day, 600 / day))


def test_peaks_stand_beside_the_plan() -> None:
    config = resolve(
        {
            "run": {"stages": ["ppo"]},
            "model": {"path": "m", "shape": SHAPE},
            "reward": {"shape": SHAPE},
            "rewards": [{"type": "model"}],
        }
    )
    plan, _ = plan_for(config, None)
    shown = as_text(replace(rehearsal_of(config), seconds={"gen": 4.0, "sync": 0.5}), plan)
    (policy,) = [line for line in shown.splitlines() if line.startswith("policy")]
    assert policy.split()[-2:] == ["3.00", "GB"]  # of its larger process
    assert "gen" in shown
    assert "4 s" in shown
    assert f"{plan.bytes_per_sync:,} bytes a generator" in shown
    assert "16 rollouts learnt; a generator was killed, 1 came back" in shown
