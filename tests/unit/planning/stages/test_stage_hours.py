"""Hours of stages, worked by hand from FLOPs, bandwidths and measured rates."""

from pathlib import Path

import pytest
from shipped_plans import CONFIGS, planned

from rlhf_ray.config import load
from rlhf_ray.planning.prediction import Plan, prediction
from rlhf_ray.planning.stages import preparing
from rlhf_ray.planning.stages.estimates import StageEstimate, stage_estimates

LLAMA = 6_738_415_616
SCORER = LLAMA - 32_000 * 4096 + 4096
PREPARE = CONFIGS / "stackllama" / "prepare.yaml"


def estimate(plan: Plan, stage: str) -> StageEstimate:
    (found,) = (each for each in stage_estimates(plan) if each.stage == stage)
    return found


def prepare_seconds(*keys: str, cluster: str = "3x8xA100-80GB") -> tuple[float, float]:
    seconds = estimate(planned(PREPARE, cluster, "prepare.posts_gb=100", *keys), "prepare").seconds
    assert seconds is not None
    return seconds


def test_processes_share_a_dump_until_the_storage_is_busy() -> None:
    # 100 GB at 3.5 MB/s a core, the second at .95 of its speed; at worst 1 MB/s and .7.
    assert prepare_seconds("prepare.num_workers=1") == pytest.approx((100e3 / 3.5, 100e3))
    two = prepare_seconds("prepare.num_workers=2")
    assert two == pytest.approx((100e3 / 3.5 / 1.95, 100e3 / 1.7))
    # 288 cores need 105 s. 1 GB/s: read, grouped written and read (.2 each), sets .6; at worst
    # 144 cores need 990 s, and .1 GB/s for 1 + .6 + 1.05 of it.
    assert prepare_seconds() == pytest.approx((200, 2650))
    # One process unpacks 80 MB/s, at worst 30.
    packed = prepare_seconds("prepare.posts=Posts.7z")
    assert packed == pytest.approx((200 + 100e3 / 80, 2650 + 100e3 / 30))


def test_a_dump_that_is_here_has_its_own_size_and_one_that_is_not_is_not_estimated(
    tmp_path: Path,
) -> None:
    for name, size in (("Posts.xml", 2000), ("site.7z", 5 * 2000), ("Posts.xml.zst", 5 * 2000)):
        (tmp_path / name).write_bytes(bytes(2000))
        assert preparing.xml_bytes(load(PREPARE, [f"prepare.posts={tmp_path / name}"])) == size
    both = f"prepare.posts=[{tmp_path}/Posts.xml,{tmp_path}/site.7z]"
    assert preparing.xml_bytes(load(PREPARE, [both])) == 12_000
    found = estimate(planned(PREPARE, "8xA100-80GB", "prepare.posts=/nowhere/Posts.xml"), "prepare")
    assert found.seconds is None
    assert found.disk is None
    assert "/nowhere/Posts.xml is not here; set prepare.posts_gb" in found.note


def test_a_process_of_prepare_holds_one_part() -> None:
    # 100 GB are a thousand parts of 100 MB.
    found = estimate(planned(PREPARE, "3x8xA100-80GB", "prepare.posts_gb=100"), "prepare")
    assert found.memory == pytest.approx(0.17e9 + 5 * 100e6)
    found = estimate(planned(PREPARE, "3x8xA100-80GB", "prepare.posts_gb=1"), "prepare")
    assert found.memory == pytest.approx(0.17e9 + 5 * 2**25)


def test_sft_takes_its_steps_two_evaluations_and_its_start() -> None:
    seconds = estimate(planned("stackllama/sft.yaml", "8xA100-80GB"), "sft").seconds
    assert seconds is not None
    # Forward, backward through a frozen base, recomputed; int8 reaches a quarter of 312 TFLOP/s.
    trained = 6 * LLAMA * 5000 * 128 * 1024 / (8 * 312e12 * 0.25)
    evaluated = 2 * LLAMA * 2 * 4000 * 1024 / (8 * 312e12 * 0.55)
    started = 10 + 2 * LLAMA / 2e9
    assert seconds[0] == pytest.approx(trained + evaluated + started, rel=1e-6)


def test_one_pass_over_pairs_has_at_most_max_pairs_and_evaluates_every_500_steps() -> None:
    seconds = estimate(planned("stackllama/reward.yaml", "8xA100-80GB"), "reward").seconds
    assert seconds is not None
    # 100,000 pairs of two texts of at most 512 tokens; 3,125 steps, so six evaluations between.
    trained = 6 * SCORER * 100_000 * 2 * 512 / (8 * 312e12 * 0.2)
    evaluated = 2 * SCORER * 8 * 50_000 * 2 * 512 / (8 * 312e12 * 0.25)
    started = 60 + 2 * LLAMA / 0.2e9
    assert seconds[1] == pytest.approx(trained + evaluated + started, rel=1e-4)
    shorter = (trained * 0.2 / 0.45 + evaluated * 0.25 / 0.55) / 2  # half as long on average
    assert seconds[0] == pytest.approx(shorter + 10 + 2 * LLAMA / 2e9, rel=1e-4)


def test_dpo_also_computes_the_bases_log_probs() -> None:
    keys = ("run.stages=[dpo]", "dpo.steps=1000", "dpo.eval_rows=1", "dpo.batch_size=64")
    seconds = estimate(planned("stackllama/sft.yaml", "8xA100-80GB", *keys), "dpo").seconds
    assert seconds is not None
    trained = (4 + 2) * LLAMA * 1000 * 64 * 2 * 1024 / (312e12 * 0.08)
    assert seconds[1] == pytest.approx(trained + 60 + 2 * LLAMA / 0.2e9, rel=1e-3)


def test_epochs_over_rows_that_are_not_read_are_not_estimated_but_their_rate_is() -> None:
    found = estimate(planned("domain_pretraining.yaml", "1xA100-80GB"), "pretrain")
    assert found.seconds is None
    assert found.memory is not None
    assert "pretrain.epochs is set, and its rows are not known" in found.note
    assert "100,000,000 tokens of them take 0.42 to 0.94 hours" in found.note


def test_ppo_takes_its_iterations_its_evaluations_and_its_start() -> None:
    found = {}
    for every in (1250, 2500):
        keys = (f"ppo.eval_every={every}",)
        plan = planned("stackllama/ppo_3x8_a100.yaml", "3x8xA100-80GB", *keys)
        seconds = estimate(plan, "ppo").seconds
        assert seconds is not None
        assert plan.time is not None
        found[every] = seconds[0] - 2500 * plan.time.iteration[0] - (10 + 2 * LLAMA / 2e9)
    one = found[1250] - found[2500]
    assert 1 < one < 10
    assert found[2500] == pytest.approx(2 * one)


def test_more_models_take_longer_to_compare() -> None:
    keys = ("run.stages=[evaluate]",)
    two = planned("stackllama/ppo_3x8_a100.yaml", "3x8xA100-80GB", *keys, "evaluate.models=[ppo]")
    one = planned("stackllama/ppo_3x8_a100.yaml", "3x8xA100-80GB", *keys)
    first, second = (estimate(plan, "evaluate").seconds for plan in (one, two))
    assert first is not None
    assert second is not None
    started = 10 + 2 * LLAMA / 2e9
    assert second[0] - started == pytest.approx(2 * (first[0] - started))


def test_hours_without_gpus_are_not_estimated_and_memory_is() -> None:
    plan = prediction(load(CONFIGS / "quickstart.yaml"), ())
    found = {each.stage: each for each in stage_estimates(plan)}
    for stage in ("pretrain", "sft", "reward", "ppo", "evaluate"):
        assert found[stage].seconds is None
        assert found[stage].note == "the speed of its CPUs is not known"
        assert (found[stage].memory or 0) > 0.37e9
        assert not found[stage].on_gpu
    assert found["prepare"].seconds is not None


def test_a_stage_whose_model_is_given_takes_nothing() -> None:
    plan = planned("quickstart.yaml", "1xA100-80GB", "reward.path=/models/reward")
    found = estimate(plan, "reward")
    assert (found.seconds, found.memory, found.note) == ((0, 0), 0, "skipped: reward.path is set")
