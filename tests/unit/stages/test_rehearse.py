"""Rehearsed configs, and a plan's use of the results."""

import json
import stat
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config import Config, dump, resolve
from rlhf_ray.errors import ConfigError
from rlhf_ray.placement.hardware import parse_cluster
from rlhf_ray.planning.plan import Plan, plan_for
from rlhf_ray.planning.rehearsal import RESULT, Rehearsal, as_text, calibrated_time, load
from rlhf_ray.planning.throughput import TimeEstimate
from rlhf_ray.runs.control import ControlFiles
from rlhf_ray.stages import rehearse
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
        gpus=[],
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


def test_a_rehearsing_job_is_listed_under_the_name_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[tuple[str, str]]()

    def run(worst: Config) -> None:
        done.append(("runs", worst.run.name))
        ControlFiles(Path(worst.run.dir)).request(stop=True)

    monkeypatch.setattr(rehearse, "run_pipeline", run)
    monkeypatch.setattr(rehearse, "name_current_job", lambda *named: done.append(named))
    inline = {"cluster": {"mode": "inline"}, "rollout": {"engine": "transformers"}}
    config = config_of(tmp_path / "run", **inline)
    assert rehearse.run(config) is None
    assert done == [(config.run.name, tmp_path / "run"), ("runs", f"{config.run.name}-rehearsal")]


def test_a_rehearsal_keeps_only_reward_sources_that_are_models(tmp_path: Path) -> None:
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


def test_a_rehearsal_makes_folders_for_their_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(worst: Config) -> None:
        raise InterruptedError(worst.run.dir)

    monkeypatch.setattr(rehearse, "run_pipeline", stopped)
    folder = tmp_path / "runs" / "first"
    with pytest.raises(InterruptedError):
        rehearse.run(config_of(folder))
    for made in (folder, folder / "rehearsal"):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_a_folder_in_use_by_another_rehearsal_is_left_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_use = tmp_path / "rehearsal"
    in_use.mkdir()
    (in_use / "prompts.jsonl").write_text("its own")

    def require_free(files: ControlFiles) -> None:
        if files._status.parent == in_use:
            raise ConfigError("in use")

    monkeypatch.setattr(ControlFiles, "require_free", require_free)
    with pytest.raises(ConfigError, match="in use"):
        rehearse.run(config_of(tmp_path))
    assert (in_use / "prompts.jsonl").read_text() == "its own"


def test_a_rehearsal_is_valid_for_its_own_config_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert is_needed(config)
    (tmp_path / RESULT).write_text(json.dumps(asdict(rehearsal_of(config))))
    assert load(config, ()) == rehearsal_of(config)
    assert not is_needed(config)
    more = config.model_copy(update={"ppo": config.ppo.model_copy(update={"iterations": 9})})
    assert load(more, ()) is not None
    longer = config.model_copy(
        update={"rollout": config.rollout.model_copy(update={"max_tokens": 7})}
    )
    assert load(longer, ()) is None
    assert is_needed(longer)


def test_a_rehearsal_is_valid_for_the_gpus_it_was_made_on(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    made = replace(rehearsal_of(config), gpus=["4 x L4-24GB", "8 x A100-80GB"])
    (tmp_path / RESULT).write_text(json.dumps(asdict(made)))
    assert load(config, parse_cluster("8xA100-80GB+4xL4-24GB")) == made
    assert load(config, parse_cluster("8xA100-80GB")) is None
    assert load(config, parse_cluster("8xA100-80GB+4xT4-16GB")) is None


@pytest.mark.parametrize(
    ("recorded", "holds"), [(["8 x None"], True), (["4 x None"], False), (["8 x H100-80GB"], False)]
)
def test_gpus_of_an_unknown_kind_match_by_number(
    recorded: list[str], holds: bool, tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    made = replace(rehearsal_of(config), gpus=recorded)
    (tmp_path / RESULT).write_text(json.dumps(asdict(made)))
    assert (load(config, parse_cluster("8xA100-80GB")) is not None) == holds


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"when": "today", "of_another": 1}'])
def test_an_unreadable_rehearsal_counts_as_none(tmp_path: Path, text: str) -> None:
    config = config_of(tmp_path)
    (tmp_path / RESULT).write_text(text)
    assert load(config, ()) is None
    assert is_needed(config)


def on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch, **peaks: int) -> Plan:
    """A config that fits one A100 and was rehearsed there."""
    config = config_of(
        folder,
        model={"path": "m", "shape": SHAPE},
        placement={"gpus": 0.25},
        cluster={"call_timeout_s": 1e-3},
        rollout={"engine_args": {"gpu_memory_utilization": 0.3}},
        reference={"kind": "policy_base"},
    )
    nodes = parse_cluster("1xA100-80GB")
    monkeypatch.setattr("rlhf_ray.planning.plan.live_cluster", lambda: nodes)
    found = {f"{role}-0": gb * 10**9 for role, gb in peaks.items()}
    made = replace(rehearsal_of(config), gpus=["1 x A100-80GB"], peak_memory_bytes=found)
    (folder / RESULT).write_text(json.dumps(asdict(made)))
    plan, changes, _ = plan_for(config, "live")
    assert not changes
    # It has shown that calls are in time, whatever was predicted.
    assert "call_timeout_s" not in " ".join(plan.assumptions)
    return plan


def test_measured_memory_replaces_the_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All four share the GPU: some 26 GB the engine's, and a few the others'.
    less = on_a_gpu(tmp_path, monkeypatch, policy=30, generator=30)
    assert less.fits
    assert not [note for note in less.assumptions if "were in use" in note]
    more = on_a_gpu(tmp_path, monkeypatch, policy=60)
    assert more.fits
    assert "60.00 GB were in use where policy is" in more.assumptions[1]
    full = on_a_gpu(tmp_path, monkeypatch, policy=84)
    assert not full.fits
    assert "its GPU has 81.61 GB for tensors" in full.shortages[0].reason


def test_measured_seconds_are_the_worst_case_and_scale_the_best(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    predicted = TimeEstimate({"gen": (1.0, 2.0)}, (1.0, 2.0), idle_gpu_hours=6.0)
    found = calibrated_time(predicted, rehearsal_of(config), config)
    # Four seconds instead of two; a save of 20 s is beside the iterations.
    assert found.phases == {"gen": (2.0, 4.0)}
    # 100 iterations of 2 instead of 1 s, and of 4 instead of 2 s.
    day = 86_400
    assert found.days == pytest.approx((1 + 100 / day, 2 + 200 / day))
    assert found.idle_gpu_hours == pytest.approx(6.0 * 6 / 3)
    unknown = calibrated_time(None, rehearsal_of(config), config)
    assert unknown.phases == {"gen": (4.0, 4.0)}
    assert unknown.days == pytest.approx((400 / day, 400 / day))


def test_measured_peaks_are_shown_beside_the_plan() -> None:
    config = resolve(
        {
            "run": {"stages": ["ppo"]},
            "model": {"path": "m", "shape": SHAPE},
            "reward": {"shape": SHAPE},
            "rewards": [{"type": "model"}],
        }
    )
    plan, *_ = plan_for(config, None)
    seconds = {"gen": 4.0, "sync": 0.5, "commit": 0.25, "save": 2.0}
    shown = as_text(replace(rehearsal_of(config), seconds=seconds), plan)
    (policy,) = [line for line in shown.splitlines() if line.startswith("policy")]
    assert policy.split()[-2:] == ["3.00", "GB"]  # of its larger process
    assert "gen" in shown
    assert "4 s" in shown
    assert f"sync: {plan.bytes_per_sync:,} bytes a generator in 0.5 s" in shown
    # Rank 16 on q, k, v, o and three of the MLP; two models of two layers, and the critic's head.
    adapter = 2 * 16 * (4 * (64 + 64) + 3 * (64 + 128))
    state = (2 * adapter + 64) * (4 + 8 + 4)
    assert f"commit: {state:,} bytes in 0.25 s, {state / 0.25e6:.3g} MB/s" in shown
    assert f"save: {state:,} bytes in 2 s, {state / 2e6:.3g} MB/s" in shown
    assert "16 rollouts learnt; a generator was killed, 1 came back" in shown
