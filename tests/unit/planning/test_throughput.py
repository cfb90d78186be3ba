"""Predicted times of shared GPUs and colocated roles, and calls that miss their deadline."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.config import load
from rlhf_ray.observability.phases import LIMIT
from rlhf_ray.placement.hardware import parse_cluster
from rlhf_ray.planning.layout_options import changed
from rlhf_ray.planning.plan import Plan
from rlhf_ray.planning.prediction import prediction
from rlhf_ray.planning.role_times import Range
from rlhf_ray.planning.roles import PlannedRole
from rlhf_ray.planning.throughput import idle_seconds

STACKLLAMA = Path(__file__).parents[3] / "configs" / "stackllama"
WHOLE_WEIGHTS = "model.quantization=none"  # those of int8 cannot be moved
APART = (
    *("placement={}", "critic.num_ranks=4", "reward.num_workers=2"),
    *("reference.kind=own", "reference.num_workers=2"),
)
"""No two roles on a GPU."""
TURNS = {
    "placement.turns": True,
    "placement.policy.gpus": 0.4,
    "placement.generator.gpus": 0.6,
}
LLAMA_7B = 6_738_415_616
TOKENS = 64 * (512 + (32 + 127) / 2)
"""Of an iteration of 64 rollouts, responses of 32 to 127 tokens."""


def phases(plan: Plan) -> Mapping[str, Range]:
    assert plan.time is not None
    return plan.time.phases


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


def test_an_iteration_is_as_long_as_the_longer_side_where_batches_are_generated_ahead() -> None:
    gpus = parse_cluster("3x8xA100-80GB")
    keys = [*APART, "ppo.importance_cap=2"]
    turns, ahead = (
        prediction(load(STACKLLAMA / "ppo_3x8_a100.yaml", [*keys, f"ppo.max_staleness={k}"]), gpus)
        for k in (0, 1)
    )
    assert turns.time is not None
    assert ahead.time is not None
    for end in (0, 1):
        seconds = {name: ends[end] for name, ends in phases(ahead).items()}
        others = sum(seconds.values()) - seconds["gen"]
        assert ahead.time.iteration[end] == pytest.approx(max(seconds["gen"], others))
        assert seconds["gen"] == phases(turns)["gen"][end]
        # The learners score a batch when it has arrived, not while it arrives.
        assert seconds["score"] >= phases(turns)["score"][end]
        assert ahead.time.iteration[end] < turns.time.iteration[end]
    assert ahead.time.days[1] < turns.time.days[1]


def test_a_generator_that_shares_its_gpu_gains_nothing_from_batches_ahead() -> None:
    plan = on_one_gpu("ppo.max_staleness=1", "ppo.importance_cap=2")
    assert plan.time is not None
    total = sum(ends[1] for ends in phases(plan).values())
    assert plan.time.iteration[1] == pytest.approx(total)


def test_a_gpu_is_idle_on_the_shorter_side_where_batches_are_generated_ahead() -> None:
    seconds = {"gen": (3.0, 3.0), "score": (1.0, 1.0), "learn": (6.0, 6.0)}
    on = {name: PlannedRole(name, 1, 1.0, {}) for name in ("policy", "generator", "reward")}
    assert idle_seconds([on["generator"]], seconds, is_ahead=True) == 7 - 3
    assert idle_seconds([on["policy"]], seconds, is_ahead=True) == 0
    assert idle_seconds([on["reward"]], seconds, is_ahead=True) == 6


def test_turns_move_the_weights_of_both_sides_twice_an_iteration() -> None:
    config = load(STACKLLAMA / "ppo_3x8_a100.yaml", [WHOLE_WEIGHTS, *APART])
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
    config = load(STACKLLAMA / "ppo_3x8_a100.yaml", [WHOLE_WEIGHTS, *APART])
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
    assert phases(plan)["score"][0] == pytest.approx(4 * pass_s, rel=1e-3)


def on_eight(*keys: str) -> Mapping[str, Range]:
    config = load(STACKLLAMA / "ppo_3x8_a100.yaml", [WHOLE_WEIGHTS, *APART, *keys])
    return phases(prediction(config, parse_cluster("4x8xA100-80GB")))


def test_workers_divide_whole_shards() -> None:
    # Of eight shards one of five workers has two, as one of four has.
    assert on_eight("generators.num=5")["gen"] == on_eight("generators.num=4")["gen"]
    assert on_eight("generators.num=5")["gen"] > on_eight("generators.num=8")["gen"]
    others = ("reward.num_workers=8", "critic.num_ranks=8", "generators.num=1")
    five, four = (on_eight(*others, f"reference.num_workers={count}") for count in (5, 4))
    assert five["score"] == four["score"]


def test_at_zero_3_every_rank_computes_every_score() -> None:
    few, many = (on_eight("policy.zero_stage=3", f"policy.num_ranks={ranks}") for ranks in (2, 8))
    assert few["score"] == many["score"]
    assert few["score"] > on_eight("policy.num_ranks=2")["score"]


def test_a_generator_of_several_gpus_waits_for_their_sums_twice_a_layer() -> None:
    def step(size: int) -> float:
        fast = ("generators.num=1", f"generators.tensor_parallel_size={size}")
        return on_eight(*fast)["gen"][0]

    # Of the 159 / 2 steps of a token each takes 32 layers x 2 x 10 microseconds, and the bytes of
    # 64 rows of 4096 numbers 1.5 times at 300 GB/s.
    sums = 79.5 * 32 * 2 * (1e-5 + 1.5 * 64 * 4096 * 2 / 300e9)
    assert step(4) > step(1) / 4 + sums
    assert step(4) < step(1)


MODELS = Path(__file__).parents[3] / "configs" / "models"
LLAMA_8B = MODELS / "llama31_8b_instruct.yaml"
INLINE = (
    "cluster.mode=inline",
    "rollout.engine=transformers",
    "generators.num=1",
    "policy.num_ranks=1",
    "critic.num_ranks=1",
    "reward.train_workers=1",
)


def planned(path: Path, *keys: str) -> Plan:
    return prediction(load(path, keys), parse_cluster("8xA100-80GB"))


def worst(plan: Plan, phase: str) -> float:
    assert plan.time is not None
    return plan.time.phases[phase][1]


def test_the_deadline_that_would_do_is_told_to_people_and_programs() -> None:
    key = "cluster.call_timeout_s"
    needed = math.ceil(worst(planned(LLAMA_8B), "learn") / LIMIT)
    assert needed == 81  # seconds without progress; ten times as long in all
    arguments = ["plan", str(LLAMA_8B), "--cluster", "8xA100-80GB", "--json"]
    late = CliRunner().invoke(cli.app, [*arguments, f"{key}={needed - 1}"])
    assert late.exit_code == 0
    (note,) = [note for note in json.loads(late.stdout)["assumptions"] if key in note]
    assert "learn 810 s" in note
    assert note.endswith(f"set {key}={needed} or more")
    in_time = CliRunner().invoke(cli.app, [*arguments, f"{key}={needed}"])
    assert not [note for note in json.loads(in_time.stdout)["assumptions"] if key in note]
    text = CliRunner().invoke(cli.app, [*arguments[:-1], f"{key}=60"])
    assert f"set {key}={needed} or more" in " ".join(text.stdout.split())


def test_a_shard_takes_as_long_as_all_that_its_generator_has_at_a_time() -> None:
    keys = ("ppo.batch_size=4096", "generators.max_in_flight=4")
    plan = planned(LLAMA_8B, *keys, "cluster.call_timeout_s=60")
    assert worst(plan, "gen") > 600
    assert plan.late_calls is not None
    assert "learn" in plan.late_calls
    assert "a shard" not in plan.late_calls
    # Of a generator's 2,048 rollouts four shards of 32 at a time: a sixteenth.
    each = planned(LLAMA_8B, *keys, "cluster.call_timeout_s=0.1").late_calls
    assert each is not None
    assert f"a shard of a generator {math.ceil(worst(plan, 'gen') / 16)} s" in each


def test_long_documents_are_all_at_a_generator_at_once() -> None:
    plan = planned(MODELS / "qwen3_8b_32k.yaml", "cluster.call_timeout_s=60")
    assert plan.late_calls is not None
    assert f"a shard of a generator {math.ceil(worst(plan, 'gen'))} s" in plan.late_calls
    assert plan.late_calls.endswith("cluster.call_timeout_s=85 or more")


def test_of_drawn_lengths_the_longest_counts() -> None:
    keys = ("generators.max_in_flight=4", "cluster.call_timeout_s=0.1")
    drawn = planned(LLAMA_8B, *keys, "rollout.length_sampler={min: 1, max: 1024}")
    whole = planned(LLAMA_8B, *keys, "rollout.max_tokens=1023")
    shards = [str(plan.late_calls).partition(" s,")[0] for plan in (drawn, whole)]
    assert shards[0] == shards[1]
    assert worst(drawn, "gen") < worst(whole, "gen")


def test_scores_wait_for_each_other() -> None:
    plan = planned(LLAMA_8B, "cluster.call_timeout_s=10")
    assert plan.late_calls is not None
    assert f"the last score of a batch {math.ceil(worst(plan, 'score'))} s" in plan.late_calls


@pytest.mark.parametrize("keys", [INLINE, ("run.stages=[reward]",)])
def test_without_calls_between_processes_none_is_late(keys: tuple[str, ...]) -> None:
    assert planned(LLAMA_8B, "cluster.call_timeout_s=1", *keys).late_calls is None
