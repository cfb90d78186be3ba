"""Layouts of one job side by side."""

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.config import load
from rlhf_ray.placement.hardware import parse_cluster
from rlhf_ray.placement.layout import Node
from rlhf_ray.planning.plan import Plan
from rlhf_ray.planning.prediction import prediction
from rlhf_ray.planning.suggestions import Layout, changed, layouts
from rlhf_ray.planning.tables import as_text

CONFIGS = Path(__file__).parents[3] / "configs"
THREE_NODES = "stackllama/ppo_3x8_a100.yaml"
WHOLE_WEIGHTS = "model.quantization=none"  # those of int8 cannot be moved
TURNS = {
    "placement.turns": True,
    "placement.policy.gpus": 0.4,
    "placement.generator.gpus": 0.6,
}


def planned(path: str, cluster: str, *keys: str) -> Plan:
    return prediction(load(CONFIGS / path, keys), parse_cluster(cluster))


def by_changes(plan: Plan) -> dict[str, Layout]:
    return {" ".join(layout.changes): layout for layout in layouts(plan)}


def listed(plan: Plan) -> list[tuple[Any, int]]:
    return [(layout.changes, layout.gpus) for layout in layouts(plan)]


def test_stackllamas_layouts_stand_side_by_side() -> None:
    plan = planned(THREE_NODES, "3x8xA100-80GB")
    assert listed(plan) == [
        ({}, 24),
        ({"reference.kind": "policy_base", "reference.num_workers": 1}, 22),
        ({"reward.num_workers": 1}, 23),  # four would need two GPUs more than there are
    ]
    with_whole_weights = planned(THREE_NODES, "3x8xA100-80GB", WHOLE_WEIGHTS)
    assert listed(with_whole_weights)[-1] == (TURNS, 16)


def test_each_layout_is_what_its_changes_come_to() -> None:
    plan = planned(THREE_NODES, "4x8xA100-80GB", WHOLE_WEIGHTS)
    found = layouts(plan)
    assert [tuple(layout.changes) for layout in found] == [
        (),
        ("reference.kind", "reference.num_workers"),
        ("reward.num_workers",),
        ("reward.num_workers",),
        tuple(TURNS),
    ]
    for layout in found:
        again = prediction(changed(plan.config, layout.changes), plan.nodes)
        assert again.fits
        assert again.time is not None
        assert layout.days == again.time.days
        assert layout.idle_gpu_hours == again.time.idle_gpu_hours


def test_programs_read_the_given_layout_first() -> None:
    arguments = ["plan", str(CONFIGS / THREE_NODES), "--cluster", "3x8xA100-80GB", "--json"]
    found = json.loads(CliRunner().invoke(cli.app, arguments).stdout)
    given, *others = found["layouts"]
    assert given == {
        "changes": {},
        "gpus": 24,
        "days": found["days"],
        "idle_gpu_hours": found["idle_gpu_hours"],
    }
    assert [other["gpus"] for other in others] == [22, 23]


def test_people_read_a_table_of_100_columns() -> None:
    plan = planned("models/qwen3_8b.yaml", "8xA100-80GB")
    text = as_text(plan, [], layouts(plan))
    table = text.split("\nlayout, as predicted", 1)[1].split("\n\n", 1)[0].splitlines()
    assert table[0].endswith("GPUs   days of the run  idle GPU-hours")
    assert table[1].startswith("as configured ")
    assert table[3].startswith("placement.turns=true placement.policy.gpus=0.4 ")
    # The engine leaves room for what the learners do not move.
    assert table[5] == "  rollout.engine_args.gpu_memory_utilization=0.8"
    assert {len(line) for line in table[1:4]} == {100}


def test_sides_that_take_turns_meet_in_pairs() -> None:
    config = load(CONFIGS / THREE_NODES, [WHOLE_WEIGHTS])
    plan = prediction(changed(config, TURNS), parse_cluster("3x8xA100-80GB"))
    seats: dict[tuple[int, int], list[str]] = {}
    for place in plan.places:
        for gpu in place.gpus:
            seats.setdefault((place.node, gpu), []).append(place.role)
    alone = [["critic"]] * 4 + [["reference"]] * 2 + [["reward"]] * 2
    assert sorted(map(sorted, seats.values())) == sorted(alone + [["generator", "policy"]] * 8)


def test_generators_that_take_turns_are_no_more_than_policy_ranks() -> None:
    plan = planned("stackllama/ppo_1x8_a100.yaml", "8xA100-80GB", WHOLE_WEIGHTS)
    (changes,) = [found.changes for found in layouts(plan) if "placement.turns" in found.changes]
    assert changes["generators.num"] == 2


def test_a_generator_that_takes_turns_goes_where_the_policy_may_be() -> None:
    nodes = [Node(role, 8, {"role": role}, "A100-80GB") for role in ("train", "rollout")]
    plan = prediction(load(CONFIGS / THREE_NODES, [WHOLE_WEIGHTS]), (*nodes, nodes[0]))
    (turns,) = [found for found in layouts(plan) if "placement.turns" in found.changes]
    assert turns.changes["placement.generator.labels"] == {"role": "train"}
    assert turns.gpus == 16


def test_of_special_layouts_the_plain_one_is_listed() -> None:
    keys = [f"{key}={str(value).lower()}" for key, value in TURNS.items()]
    turns = planned(THREE_NODES, "3x8xA100-80GB", WHOLE_WEIGHTS, *keys)
    (own,) = [found for found in layouts(turns) if "placement.turns" in found.changes]
    plain = by_changes(planned(THREE_NODES, "3x8xA100-80GB", WHOLE_WEIGHTS))[""]
    assert (own.gpus, own.days, own.idle_gpu_hours) == (24, plain.days, plain.idle_gpu_hours)
    keys = ["reference.kind=policy_base", "reference.num_workers=1"]
    base = planned(THREE_NODES, "3x8xA100-80GB", *keys)
    assert ({"reference.kind": "own"}, 23) in listed(base)


def test_where_it_does_not_fit_or_its_pace_is_unknown_there_is_no_table() -> None:
    assert layouts(planned(THREE_NODES, "1x8xA100-80GB")) == []
    unknown = prediction(load(CONFIGS / THREE_NODES), [Node("a", 24)])
    assert unknown.fits
    assert layouts(unknown) == []
    assert layouts(planned("stackllama/sft.yaml", "8xA100-80GB")) == []
