"""Calls that would miss their deadline are told before the run."""

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.config import load
from rlhf_ray.placement.hardware import parse_cluster
from rlhf_ray.planning.plan import Plan
from rlhf_ray.planning.prediction import prediction

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
    assert plan.pace is not None
    return plan.pace.phases[phase][1]


def test_the_deadline_that_would_do_is_told_to_people_and_programs() -> None:
    key = "cluster.call_timeout_s"
    needed = math.ceil(worst(planned(LLAMA_8B), "learn"))
    assert needed == 810  # seconds
    arguments = ["plan", str(LLAMA_8B), "--cluster", "8xA100-80GB", "--json"]
    late = CliRunner().invoke(cli.app, [*arguments, f"{key}={needed - 1}"])
    assert late.exit_code == 0
    (note,) = [note for note in json.loads(late.stdout)["assumptions"] if key in note]
    assert f"learn {needed} s" in note
    assert note.endswith(f"set {key}={needed} or more")
    in_time = CliRunner().invoke(cli.app, [*arguments, f"{key}={needed}"])
    assert not [note for note in json.loads(in_time.stdout)["assumptions"] if key in note]
    text = CliRunner().invoke(cli.app, [*arguments[:-1], f"{key}=600"])
    assert f"set {key}={needed} or more" in " ".join(text.stdout.split())


def test_a_shard_takes_as_long_as_all_that_its_generator_has_at_a_time() -> None:
    keys = ("ppo.batch_size=4096", "generators.max_in_flight=4")
    plan = planned(LLAMA_8B, *keys, "cluster.call_timeout_s=600")
    assert worst(plan, "gen") > 600
    assert plan.late_calls is not None
    assert "learn" in plan.late_calls
    assert "a shard" not in plan.late_calls
    # Of a generator's 2,048 rollouts four shards of 32 at a time: a sixteenth.
    each = planned(LLAMA_8B, *keys, "cluster.call_timeout_s=1").late_calls
    assert each is not None
    assert f"a shard of a generator {math.ceil(worst(plan, 'gen') / 16)} s" in each


def test_long_documents_are_all_at_a_generator_at_once() -> None:
    plan = planned(MODELS / "qwen3_8b_32k.yaml", "cluster.call_timeout_s=600")
    assert plan.late_calls is not None
    assert f"a shard of a generator {math.ceil(worst(plan, 'gen'))} s" in plan.late_calls
    assert plan.late_calls.endswith("cluster.call_timeout_s=846 or more")


def test_of_drawn_lengths_the_longest_counts() -> None:
    keys = ("generators.max_in_flight=4", "cluster.call_timeout_s=1")
    drawn = planned(LLAMA_8B, *keys, "rollout.length_sampler={min: 1, max: 1024}")
    whole = planned(LLAMA_8B, *keys, "rollout.max_tokens=1023")
    shards = [str(plan.late_calls).partition(" s,")[0] for plan in (drawn, whole)]
    assert shards[0] == shards[1]
    assert worst(drawn, "gen") < worst(whole, "gen")


def test_scores_wait_for_each_other() -> None:
    plan = planned(LLAMA_8B, "cluster.call_timeout_s=100")
    assert plan.late_calls is not None
    assert f"the last score of a batch {math.ceil(worst(plan, 'score'))} s" in plan.late_calls


@pytest.mark.parametrize("keys", [INLINE, ("run.stages=[reward]",)])
def test_without_calls_between_processes_none_is_late(keys: tuple[str, ...]) -> None:
    assert planned(LLAMA_8B, "cluster.call_timeout_s=1", *keys).late_calls is None
