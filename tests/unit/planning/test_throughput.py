"""The pace of roles that share GPUs, and of sides that take turns on them."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf_ray.config import load
from rlhf_ray.placement.hardware import parse_cluster
from rlhf_ray.planning.changes import changed
from rlhf_ray.planning.plan import Plan
from rlhf_ray.planning.prediction import prediction
from rlhf_ray.planning.roles import PlannedRole
from rlhf_ray.planning.throughput import Range, idle_seconds

STACKLLAMA = Path(__file__).parents[3] / "configs" / "stackllama"
WHOLE_WEIGHTS = "model.quantization=none"  # those of int8 cannot be moved
TURNS = {
    "placement.turns": True,
    "placement.policy.gpus": 0.4,
    "placement.generator.gpus": 0.6,
}
LLAMA_7B = 6_738_415_616
TOKENS = 64 * (512 + (32 + 127) / 2)
"""Of an iteration of 64 rollouts, responses of 32 to 127 tokens."""


def phases(plan: Plan) -> Mapping[str, Range]:
    assert plan.pace is not None
    return plan.pace.phases


def on_one_gpu(*keys: str) -> Plan:
    config = load(STACKLLAMA / "ppo_1_gpu.yaml", keys)
    return prediction(config, parse_cluster("1xA100-80GB"))


def test_a_gpu_is_idle_while_no_role_on_it_works() -> None:
    seconds = {"gen": (2.0, 4.0), "score": (1.0, 1.0), "learn": (5.0, 7.0), "save": (0.0, 1.0)}
    on = {name: PlannedRole(name, 1, 0.5, {}) for name in ("policy", "generator", "reward")}
    # In the middle 3 + 1 + 6 + 0.5 seconds.
    assert idle_seconds([on["generator"]], seconds) == 1 + 6 + 0.5
    assert idle_seconds([on["policy"]], seconds) == 3 + 0.5
    assert idle_seconds([on["policy"], on["generator"]], seconds) == 0.5
    assert idle_seconds([on["reward"], on["generator"]], seconds) == 6 + 0.5
    assert idle_seconds([on["reward"], on["reward"]], seconds) == 3 + 6 + 0.5


def test_turns_move_the_weights_of_both_sides_twice_an_iteration() -> None:
    config = load(STACKLLAMA / "ppo_3x8_a100.yaml", [WHOLE_WEIGHTS])
    nodes = parse_cluster("3x8xA100-80GB")
    assert "turns" not in phases(prediction(config, nodes))
    turns = prediction(changed(config, TURNS), nodes)
    # A generator's and a policy rank's 13.48 GB, out and in, at 20 and at 2 GB/s.
    moved = 2 * (LLAMA_7B * 2 + LLAMA_7B * 2) / 1e9
    assert phases(turns)["turns"] == pytest.approx((moved / 20, moved / 2), rel=1e-3)


def test_turns_move_what_learners_have_on_one_gpu_together() -> None:
    plan = on_one_gpu(WHOLE_WEIGHTS, "placement.turns=true")
    critic = LLAMA_7B - 32_000 * 4_096 + 4_096  # a scalar head in place of the output layer
    moved = 2 * (LLAMA_7B * 2 + LLAMA_7B * 2 + critic * 2) / 1e9
    assert phases(plan)["turns"] == pytest.approx((moved / 20, moved / 2), rel=1e-3)


def test_generation_does_not_hide_the_scoring_of_a_side_that_sleeps() -> None:
    config = load(STACKLLAMA / "ppo_3x8_a100.yaml", [WHOLE_WEIGHTS])
    nodes = parse_cluster("3x8xA100-80GB")
    operations = 2 * TOKENS * LLAMA_7B
    # At best 0.55 of 312 TFLOP/s: two references, a tenth of it after generation; four critics.
    references = 0.1 * operations / (2 * 312e12 * 0.55)
    critics = operations / (4 * 312e12 * 0.55)
    at_once, turns = prediction(config, nodes), prediction(changed(config, TURNS), nodes)
    assert phases(at_once)["score"][0] == pytest.approx(references, rel=1e-3)
    assert phases(turns)["score"][0] == pytest.approx(critics, rel=1e-3)


def test_roles_on_one_gpu_take_as_long_as_all_of_them() -> None:
    plan = on_one_gpu()
    # Four epochs; forward, backward through a frozen base, recomputed; int8 reaches a quarter.
    group = 6 * 4 * TOKENS * LLAMA_7B / (312e12 * 0.25)
    assert phases(plan)["learn"][0] == pytest.approx(2 * group, rel=1e-3)
    # The policy twice, as its base is the reference; the critic; the reward model.
    pass_s = 2 * TOKENS * LLAMA_7B / (312e12 * 0.55)
    assert phases(plan)["score"][0] == pytest.approx(0.1 * 4 * pass_s, rel=1e-3)
