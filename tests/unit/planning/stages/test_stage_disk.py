"""Bytes of stages in run.dir, worked by hand."""

import pytest
from shipped_plans import planned

from rlhf_ray.planning.roles import state_bytes
from rlhf_ray.planning.stages.disk import Disk
from rlhf_ray.planning.stages.estimates import stage_estimates

LLAMA, ADAPTER = 6_738_415_616, 8_388_608
STACKLLAMA = "stackllama/ppo_3x8_a100.yaml"


def disk(path: str, stage: str, *keys: str) -> Disk:
    (found,) = (
        each.disk
        for each in stage_estimates(planned(path, "3x8xA100-80GB", *keys))
        if each.stage == stage
    )
    assert found is not None
    return found


def test_a_dump_leaves_its_sets_and_its_posts_lie_beside_them_while_they_are_grouped() -> None:
    found = disk("stackllama/prepare.yaml", "prepare", "prepare.posts_gb=100")
    assert found.kept == pytest.approx((60e9, 105e9))
    assert found.peak == pytest.approx((80e9, 135e9))
    keys = ("prepare.posts_gb=100", "prepare.scratch=/scratch")
    assert disk("stackllama/prepare.yaml", "prepare", *keys).peak == found.kept


def test_sft_leaves_an_adapter_and_the_merged_model() -> None:
    found = disk("stackllama/sft.yaml", "sft")
    assert found.kept[1] == 4 * ADAPTER + 2 * LLAMA
    # Two checkpoints of fp32 and Adam, and the tokens of 5,000 steps.
    checkpoints = 2 * (4 + 8) * ADAPTER
    assert found.peak[1] == found.kept[1] + checkpoints + 4 * 5000 * 128 * 1024


def test_full_training_saves_all_weights_in_every_checkpoint() -> None:
    keys = ("sft.tuning=full", "model.quantization=none", "sft.steps=1", "sft.batch_size=8")
    found = disk("stackllama/sft.yaml", "sft", *keys)
    assert found.kept[1] == 2 * LLAMA
    assert found.peak[1] == 2 * LLAMA + 2 * 12 * LLAMA + 4 * 8 * 1024


def test_ppo_keeps_its_newest_commits_the_best_one_and_batches() -> None:
    plan = planned(STACKLLAMA, "3x8xA100-80GB")
    state = state_bytes(plan.config, plan.models)
    none = disk(STACKLLAMA, "ppo", "run.keep_batches=none")
    fewer = disk(STACKLLAMA, "ppo", "run.keep_batches=none", "ppo.keep_checkpoints=2")
    assert none.kept[0] - fewer.kept[0] == pytest.approx(state)
    assert none.peak[0] - none.kept[0] == pytest.approx(state)
    keys = ("run.keep_batches=none", "ppo.save_every=2", "ppo.keep_adapters=all")
    adapters = disk(STACKLLAMA, "ppo", *keys)
    assert adapters.kept[0] - none.kept[0] == pytest.approx(1250 * 2 * ADAPTER)
    batch = state + 64 * 640 * 29
    every = disk(STACKLLAMA, "ppo", "run.keep_batches=all")
    assert every.kept[0] - none.kept[0] == pytest.approx(2500 * batch)
