"""The best layouts of one job: what is listed keeps what is learnt, fits, and saves something."""

import itertools
import json
import shlex
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.config import Config, load
from rlhf_ray.config.identity import adjustments, differences
from rlhf_ray.config.stages import STAGES
from rlhf_ray.placement.hardware import parse_cluster
from rlhf_ray.placement.layout import Node
from rlhf_ray.planning.layout_options import changed
from rlhf_ray.planning.plan import Plan
from rlhf_ray.planning.prediction import prediction
from rlhf_ray.planning.suggestions import Layout, best_layouts
from rlhf_ray.planning.tables import as_text

CONFIGS = Path(__file__).parents[3] / "configs"
THREE_NODES = "stackllama/ppo_3x8_a100.yaml"
ONE_NODE = "stackllama/ppo_1x8_a100.yaml"
WHOLE_WEIGHTS = "model.quantization=none"  # those of int8 cannot be moved
APART = (
    *("placement={}", "critic.num_ranks=4", "reward.num_workers=2"),
    *("reference.kind=own", "reference.num_workers=2"),
)
"""Eight policy ranks, eight generators, and no two roles on a GPU."""
SEVEN_ALONE = (
    *("placement={}", "critic.num_ranks=1", "policy.num_ranks=2"),
    *("generators.num=3", "reward.num_workers=1"),
)
TURNS = {
    "placement.turns": True,
    "placement.policy.gpus": 0.4,
    "placement.generator.gpus": 0.6,
}
JOBS = [
    (THREE_NODES, "3x8xA100-80GB", ()),
    (THREE_NODES, "3x8xA100-80GB", APART),
    (ONE_NODE, "8xA100-80GB", SEVEN_ALONE),
    ("stackllama/ppo_1_gpu.yaml", "1xA100-80GB", ()),
    ("stackllama/ppo_1_gpu.yaml", "4xA100-80GB", ()),
    ("models/llama31_8b_instruct.yaml", "8xA100-80GB", ()),
    ("models/llama31_70b_qlora.yaml", "2x8xA100-80GB", ()),
    ("models/qwen3_8b.yaml", "8xA100-80GB", ()),
    ("models/qwen3_8b_32k.yaml", "8xA100-80GB", ()),
    ("models/qwen25_0_5b_1gpu.yaml", "1xA10G-24GB", ()),
    ("models/qwen25_32b_tp.yaml", "2x8xA100-80GB", ()),
    ("models/qwen3_8b.yaml", "8xA100-80GB+4xH100-80GB", ()),
]


def planned(path: str, cluster: str, *keys: str) -> Plan:
    return prediction(load(CONFIGS / path, keys), parse_cluster(cluster))


def costs(layout: Layout) -> tuple[float, float]:
    return sum(layout.days) / 2, layout.gpu_hours


def learnt_changes(before: Config, after: Config) -> list[str]:
    saved = before.model_dump(mode="json")
    changes = [*differences(saved, after, STAGES), *adjustments(saved, after, STAGES)]
    return [key for key, _, _ in changes]


@pytest.mark.parametrize(("path", "cluster", "keys"), JOBS)
def test_each_layout_loads_fits_learns_the_same_and_saves_something(
    path: str, cluster: str, keys: tuple[str, ...]
) -> None:
    config = load(CONFIGS / path, keys)
    arguments = ["plan", str(CONFIGS / path), *keys, "--cluster", cluster, "--json"]
    result = CliRunner().invoke(cli.app, [*arguments, "--optimize"])
    found = json.loads(result.stdout)["layouts"]
    given = found.pop(0)
    assert given["changes"] == {}
    for layout in found:
        overrides = shlex.split(" ".join(layout["overrides"]))
        again = planned(path, cluster, *keys, *overrides)
        assert again.fits, layout
        assert again.time is not None
        assert list(again.time.days) == layout["days_range"]
        assert again.late_calls is None
        learnt = [] if layout["learns_the_same"] else ["model.quantization"]
        assert learnt_changes(config, again.config) == learnt
        saved = (given[cost] - layout[cost] for cost in ("days", "gpu_hours"))
        assert max(saved) > 0


@pytest.mark.parametrize(("path", "cluster", "keys"), JOBS)
def test_no_layout_is_better_than_another_in_both(
    path: str, cluster: str, keys: tuple[str, ...]
) -> None:
    layouts = best_layouts(planned(path, cluster, *keys))
    for base in (True, False):
        found = [costs(layout) for layout in layouts if layout.learns_the_same is base]
        for one, other in itertools.permutations(found[base:], 2):  # without the given one
            assert one[0] > other[0] or one[1] > other[1]


def test_of_the_flagship_the_layout_that_ships_is_the_fastest() -> None:
    for path, cluster in ((THREE_NODES, "3x8xA100-80GB"), (ONE_NODE, "8xA100-80GB")):
        given, *others = best_layouts(planned(path, cluster))
        same = [layout for layout in others if layout.learns_the_same]
        assert all(costs(given)[0] < costs(layout)[0] for layout in same)


def test_from_eight_generators_and_four_critic_ranks_it_finds_the_flagship() -> None:
    plan = planned(THREE_NODES, "3x8xA100-80GB", *APART)
    given, fastest, *_ = best_layouts(plan, ["generators.tensor_parallel_size"])
    shipped = load(CONFIGS / THREE_NODES)
    assert changed(plan.config, fastest.changes) == shipped
    # By hand, at best: four epochs of four operations a parameter and token, a quarter of 312
    # TFLOP/s; of four ranks of the critic, and of eight.
    tokens, parameters = 64 * (512 + (32 + 127) / 2), 6_738_415_616
    learn = 4 * 4 * tokens * parameters / (312e12 * 0.25)
    saved = learn / 4 - learn / 8
    assert given.days[0] - fastest.days[0] == pytest.approx(2500 * saved / 86_400, rel=0.05)
    assert fastest.gpus == 24


def test_the_search_takes_less_than_two_seconds_on_three_nodes() -> None:
    plan = planned(THREE_NODES, "3x8xA100-80GB", *APART)
    seconds = []
    for _ in range(2):
        started = time.process_time()
        best_layouts(plan)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 2


@pytest.mark.parametrize(
    "keys",
    [
        ("policy.num_ranks=4",),
        ("generators.num=5", "generators.tensor_parallel_size=1"),
        ("generators={num: 3}",),
        ("placement.gpus=1", "reference.kind=own"),
        ("rollout.engine_args.gpu_memory_utilization=0.3",),
        ("model.quantization=int8", "reward.num_workers=1"),
        ("ppo.max_tokens_per_micro_batch=1024", "policy.gradient_checkpointing=true"),
    ],
)
def test_keys_of_the_command_line_stay(keys: tuple[str, ...]) -> None:
    path = str(CONFIGS / THREE_NODES)
    arguments = ["plan", path, *APART, *keys, "--cluster", "3x8xA100-80GB", "--json", "--optimize"]
    layouts = json.loads(CliRunner().invoke(cli.app, arguments).stdout)["layouts"]
    kept = load(CONFIGS / THREE_NODES, [*APART, *keys])
    for layout in layouts:
        config = changed(kept, layout["changes"])
        for key in (*APART, *keys):
            name = key.partition("=")[0]
            assert value(config, name) == value(kept, name), layout["changes"]


def value(config: Config, key: str) -> Any:
    found: Any = config.model_dump()
    for name in key.split("."):
        found = found[name]
    return found


def test_a_given_part_of_a_gpu_is_that_of_every_role() -> None:
    plan = planned(ONE_NODE, "8xA100-80GB", "placement={}", "placement.gpus=1", "generators.num=2",
                   "policy.num_ranks=2", "critic.num_ranks=2", "reward.num_workers=1")  # fmt: skip
    found = best_layouts(plan, ["placement.gpus"])
    assert len(found) > 1
    assert not [key for layout in found for key in layout.changes if key.endswith(".gpus")]


def test_without_the_option_no_layout_is_searched() -> None:
    arguments = ["plan", str(CONFIGS / THREE_NODES), "--cluster", "3x8xA100-80GB"]
    assert "layout, as predicted" not in CliRunner().invoke(cli.app, arguments).stdout
    assert json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)["layouts"] == []


def test_where_the_given_layout_does_not_fit_others_are_listed() -> None:
    found = best_layouts(planned(THREE_NODES, "1x8xA100-80GB"))
    assert found[0].changes
    assert found[0].gpus <= 8


def test_people_read_a_table_of_100_columns() -> None:
    plan = planned("models/qwen3_8b.yaml", "8xA100-80GB")
    text = as_text(plan, [], best_layouts(plan))
    table = text.split("\nlayout, as predicted", 1)[1].split("\n\n", 1)[0].splitlines()
    assert table[0].split() == ["days", "of", "PPO", "GPU-hours", "GPUs", "free", "GB", "a", "GPU"]
    assert table[1].startswith("as configured ")
    assert table[2].startswith("1 ")
    assert max(map(len, table)) <= 100
    assert "'placement.share=[[policy,generator],[critic,reward]]'" in " ".join(table)


def test_the_table_says_where_nothing_better_was_found_or_nothing_compared() -> None:
    plan = planned("models/qwen25_0_5b_1gpu.yaml", "1xA10G-24GB")
    given = best_layouts(plan)[:1]
    assert "no other saves 5% of the days or of the GPU-hours" in as_text(plan, [], given)
    supervised = planned("stackllama/sft.yaml", "8xA100-80GB")
    assert "no layouts to compare" in as_text(supervised, [], best_layouts(supervised))


def test_sides_that_take_turns_meet_in_pairs() -> None:
    config = load(CONFIGS / THREE_NODES, [WHOLE_WEIGHTS, *APART])
    plan = prediction(changed(config, TURNS), parse_cluster("3x8xA100-80GB"))
    seats: dict[tuple[int, int], list[str]] = {}
    for place in plan.places:
        for gpu in place.gpus:
            seats.setdefault((place.node, gpu), []).append(place.role)
    alone = [["critic"]] * 4 + [["reference"]] * 2 + [["reward"]] * 2
    assert sorted(map(sorted, seats.values())) == sorted(alone + [["generator", "policy"]] * 8)


def test_generators_that_take_turns_are_no_more_than_policy_ranks() -> None:
    plan = planned("models/llama31_8b_instruct.yaml", "8xA100-80GB")
    turns = [found for found in best_layouts(plan) if found.changes.get("placement.turns")]
    assert turns
    for layout in turns:
        config = changed(plan.config, layout.changes)
        assert config.generators.num <= config.policy.num_ranks


def test_a_generator_beside_the_policy_goes_where_the_policy_may_be() -> None:
    nodes = [Node(role, 8, {"role": role}, "A100-80GB") for role in ("train", "rollout")]
    plan = prediction(load(CONFIGS / THREE_NODES, APART), (*nodes, nodes[0]))
    beside = [
        layout for layout in best_layouts(plan) if "placement.generator.gpus" in layout.changes
    ]
    assert beside
    for layout in beside:
        assert layout.changes["placement.generator.labels"] == {"role": "train"}


def test_where_its_pace_is_unknown_there_is_no_layout_to_compare() -> None:
    unknown = prediction(load(CONFIGS / THREE_NODES), [Node("a", 24)])
    assert unknown.fits
    assert best_layouts(unknown) == []
    assert best_layouts(planned("stackllama/sft.yaml", "8xA100-80GB")) == []
    assert best_layouts(prediction(load(CONFIGS / "quickstart.yaml"), ())) == []
    inline = ("cluster.mode=inline", "rollout.engine=transformers")
    one = planned("models/qwen25_0_5b_1gpu.yaml", "1xA10G-24GB", *inline)
    assert best_layouts(one) == []
