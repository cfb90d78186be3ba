"""The plan of known jobs on known clusters: what fits, what does not, and why."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from shipped_plans import CONFIGS, planned, reasons
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.config import Config, load
from rlhf_ray.config.identity import fixed_keys
from rlhf_ray.errors import DataError
from rlhf_ray.placement.hardware import parse_cluster
from rlhf_ray.placement.layout import Node
from rlhf_ray.planning.memory import GB
from rlhf_ray.planning.plan import prediction_for
from rlhf_ray.planning.prediction import memory_gb, prediction, together
from rlhf_ray.planning.roles import PlannedRole
from rlhf_ray.planning.suggestions import fitting_changes
from rlhf_ray.planning.tables import as_json, as_text

QUICKSTART = CONFIGS / "quickstart.yaml"
STACKLLAMA = CONFIGS / "stackllama" / "ppo_3x8_a100.yaml"
SHIPPED = [
    ("stackllama/ppo_1_gpu.yaml", "1xA100-80GB"),
    ("stackllama/ppo_1x8_a100.yaml", "8xA100-80GB"),
    ("stackllama/ppo_3x8_a100.yaml", "3x8xA100-80GB"),
    ("stackllama/sft.yaml", "8xA100-80GB"),
    ("stackllama/full_1x8_a100.yaml", "8xA100-80GB"),
    ("stackllama/full_3x8_a100.yaml", "3x8xA100-80GB"),
    ("stackllama/reward.yaml", "8xA100-80GB"),
    ("models/llama31_8b_instruct.yaml", "8xA100-80GB"),
    ("models/llama31_70b_qlora.yaml", "2x8xA100-80GB"),
    ("models/qwen3_8b.yaml", "8xA100-80GB"),
    ("models/qwen3_8b_32k.yaml", "8xA100-80GB"),
    ("models/qwen25_0_5b_1gpu.yaml", "1xA10G-24GB"),
    ("models/qwen25_32b_tp.yaml", "2x8xA100-80GB"),
]
"""Configs, and the machines that they name."""


def test_stackllama_fits_three_nodes_of_eight_and_programs_can_read_it() -> None:
    arguments = ["plan", str(STACKLLAMA), "--cluster", "3x8xA100-80GB", "--json"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["fits"] is True
    assert found["reasons"] == []
    named = {"fits", "reasons", "roles", "placement", "seconds_per_iteration", "bytes_per_sync"}
    assert named | {"days"} <= set(found)
    assert {frozenset(place) for place in found["placement"]} == {
        frozenset({"role", "rank", "node", "gpu"})
    }
    policy = found["roles"]["policy"]
    assert (policy["workers"], policy["gpus_per_worker"]) == (8, 1)
    parts = dict(policy["memory_gb"])
    assert parts.pop("total") == pytest.approx(sum(parts.values()))
    assert parts["weights"] == pytest.approx(7.0, abs=0.01)  # 7 GB of an int8 7B
    assert len(found["placement"]) == 32
    assert {place["gpu"] for place in found["placement"] if place["role"] == "reward"} == {
        *range(8)
    }
    assert {"role": "policy", "rank": 7, "node": "node-0", "gpu": 7} in found["placement"]
    seconds = dict(found["seconds_per_iteration"])
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    assert found["bytes_per_sync"] == 2 * 8_388_608
    # Policy and critic in fp32 with Adam's two moments; the saved adapters in bf16 and in fp32.
    policy, critic = 8_388_608, 8_388_608 + 4_096
    assert found["bytes_per_commit"] == 12 * (policy + critic) + 2 * policy + 4 * critic
    assert found["seconds_per_commit"] == [
        pytest.approx(found["bytes_per_commit"] / rate) for rate in (1e9, 1e8)
    ]
    best, worst = found["days_range"]
    assert best < found["days"] < worst < 20 / 24  # published: 20 hours


def test_text_is_readable_at_100_columns() -> None:
    plan = planned(STACKLLAMA, "3x8xA100-80GB")
    answer, tables = as_text(plan, []).split("\nrole ", 1)
    assert max(map(len, tables.splitlines())) <= 100
    assert answer.startswith("It fits.\ndays of the run: ")
    assert "node-0, 8 x A100-80GB:\n  0: policy-0  1: policy-1" in tables


def test_full_fine_tuning_of_70b_does_not_fit_one_gpu() -> None:
    keys = ("run.stages=[sft]", "sft.tuning=full", "model.quantization=none")
    plan = planned("models/llama31_70b_qlora.yaml", "1xA100-80GB", *keys)
    assert not plan.fits
    # 16 bytes of each of 70.55e9 parameters, and 2 of its copy in half precision.
    state = sum(
        plan.role("sft").parts[part]
        for part in ("weights", "gradients", "optimizer", "autocast weights")
    )
    assert state == pytest.approx(18 * 70.55e9, rel=1e-3)
    assert "sft needs 1,350.3 GB on one A100-80GB, which has 81.6 GB for tensors" in reasons(plan)
    (change,) = fitting_changes(plan)
    assert {"sft.tuning", "model.quantization"} <= set(change)


def test_7b_in_full_is_divided_by_zero_and_may_be_offloaded() -> None:
    size = 6_738_415_616
    parts = planned("stackllama/full_1x8_a100.yaml", "8xA100-80GB").role("pretrain").parts
    # Stage 3 on eight: of 4 bytes of weights, 4 + 4 of gradients, 4 + 8 of the optimizer. It
    # gathers a billion weights at a time, in half precision.
    assert parts["weights"] == size * 4 / 8
    assert parts["gathered"] == 2e9
    assert parts["gradients"] == size * 8 / 8
    assert parts["optimizer"] == size * 12 / 8
    assert parts["autocast weights"] == 0
    parts = planned("stackllama/full_3x8_a100.yaml", "3x8xA100-80GB").role("pretrain").parts
    # Stage 2 on 24 keeps the weights whole, and copies of them in half precision.
    assert parts["weights"] == size * 4
    assert parts["autocast weights"] == size * 2
    assert parts["gradients"] == size * 8 / 24
    assert parts["optimizer"] == size * 12 / 24
    keys = ("pretrain.deepspeed={zero: {offload_optimizer: {device: cpu}}}",)
    plan = planned("stackllama/full_1x8_a100.yaml", "8xA100-80GB", *keys)
    assert plan.role("pretrain").parts["optimizer"] == 0
    assert plan.role("pretrain").parts["gradients"] == size * 4 / 8
    # 16 / 8 bytes of each: weights, moments, and gradients at the step.
    assert "pretrain has its optimizer in main memory, 13.48 GB for each" in as_text(plan, [])


def test_an_adapters_base_is_divided_by_zero_3() -> None:
    keys = ("reward.zero_stage=3",)
    whole, divided = (
        planned("stackllama/reward.yaml", "8xA100-80GB", *more).role("reward_model")
        for more in ((), keys)
    )
    assert divided.parts["weights"] == pytest.approx(whole.parts["weights"] / 8)
    assert divided.parts["gathered"] == 2e9
    assert divided.start > whole.parts["weights"]  # each process loads it whole
    assert whole.start == 0


def test_32b_fits_two_nodes_with_two_gpus_a_generator_and_zero_3() -> None:
    keys = ("generators.tensor_parallel_size=2",)
    plan = planned("models/qwen25_32b_tp.yaml", "2x8xA100-80GB", *keys)
    assert plan.fits
    assert plan.role("generator").gpus == 2
    policy = plan.role("policy")
    # A quarter of 65.5 GB, and a billion parameters that are gathered at a time.
    assert policy.parts["weights"] + policy.parts["gathered"] == pytest.approx(18.4 * GB, rel=1e-2)
    assert policy.start > 65.5 * GB > policy.total  # whole until it is divided
    rows = [place for place in plan.places if place.role == "generator"]
    assert [len(place.gpus) for place in rows] == [2, 2]


def test_32b_does_not_load_on_40_gb_although_zero_3_would_divide_it() -> None:
    plan = planned("models/qwen25_32b_tp.yaml", "2x8xA100-40GB")
    assert "policy's weights are whole while it loads, before ZeRO-3 divides them" in reasons(plan)


def test_70b_fits_two_nodes_as_an_adapter_on_nf4_with_four_gpus_a_generator() -> None:
    plan = planned("models/llama31_70b_qlora.yaml", "2x8xA100-80GB")
    assert plan.fits
    # 68.5e9 parameters of the blocks at 0.516 bytes, 2.1e9 at 2; heads of KV are divided by four.
    assert plan.role("policy").parts["weights"] == pytest.approx(39.5 * GB, rel=1e-2)
    assert plan.role("generator").parts["weights"] == pytest.approx(141.1 * GB / 4, rel=1e-2)
    one = planned("models/llama31_70b_qlora.yaml", "2x8xA100-80GB", "generators.num=1",
                  "generators.tensor_parallel_size=1")  # fmt: skip
    assert "a generator has 0.00 GB left for its KV cache" in reasons(one)
    assert any("generators.tensor_parallel_size" in change for change in fitting_changes(one))


@pytest.mark.parametrize("nodes", [(), parse_cluster("1xA100-80GB")], ids=["cpu", "gpu"])
def test_a_cache_that_grows_with_what_is_sampled_is_not_short(nodes: tuple[Node, ...]) -> None:
    keys = ["model.max_length=96", "rollout.max_prompt_tokens=24", "rollout.max_tokens=12"]
    keys += ["rollout.shard_size=2", "placement.gpus=0.2"]
    grows = prediction(load(QUICKSTART, [*keys, "rollout.engine=transformers"]), nodes)
    assert not grows.shortages
    assert "a generator's KV cache holds 2 sequences of 36 tokens" in as_text(grows, [])
    fixed = prediction(load(QUICKSTART, [*keys, "rollout.kv_cache_gb=1e-5"]), ())
    assert "one sequence of model.max_length 96 needs 0.00 GB" in reasons(fixed)


def test_8b_with_32k_of_context_fits_and_needs_recomputing() -> None:
    plan = planned("models/qwen3_8b_32k.yaml", "8xA100-80GB")
    assert plan.fits
    # 36 layers x 8 heads x 128 x 2 x 2 bytes = 147,456 bytes a token: 4.83 GB a sequence.
    assert plan.sequences == int(plan.role("generator").parts["KV cache"] / (147_456 * 32_768))
    assert plan.sequences == 12
    kept = planned("models/qwen3_8b_32k.yaml", "8xA100-80GB", "policy.gradient_checkpointing=false")
    assert "policy needs" in reasons(kept)
    assert {"policy.gradient_checkpointing": True} in fitting_changes(kept)


@pytest.mark.parametrize(("path", "cluster"), SHIPPED)
def test_shipped_configs_fit_the_machines_that_they_name_and_are_in_time(
    path: str, cluster: str
) -> None:
    plan = planned(path, cluster)
    assert reasons(plan) == ""
    assert plan.late_calls is None


def test_no_shipped_config_that_names_machines_is_left_out() -> None:
    there = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/*.yaml")}
    elsewhere = {"ci/prove_recipe.yaml", "stackllama/prepare.yaml"}  # on CPUs
    shared = {"stackllama/llama_7b.yaml", "stackllama/ppo.yaml"}  # no jobs of their own
    assert there - elsewhere - shared == {path for path, _ in SHIPPED}


def test_training_all_of_7b_takes_70_gb_as_it_was_published_and_112_as_it_is_done_here() -> None:
    keys = ("sft.tuning=full", "model.quantization=none", "model.dtype=float16")
    parts = planned("stackllama/sft.yaml", "8xA100-80GB", *keys).role("sft").parts
    of_7b = {name: size / 6_738_415_616 * 7 for name, size in parts.items()}  # GB
    # Published: 2 bytes a parameter in half precision, and 8 of Adam's moments.
    assert of_7b["autocast weights"] + of_7b["optimizer"] == pytest.approx(70)
    # Here weights and gradients of four bytes each stand beside the moments.
    assert of_7b["weights"] + of_7b["gradients"] + of_7b["optimizer"] == pytest.approx(112)


def test_int8_and_lora_take_a_fifth_to_two_fifths_more_than_the_parameters() -> None:
    """The report's 1.2 to 1.4 GB a billion parameters, from short batches to long ones."""
    for tokens in (512, 1024):
        keys = ("sft.batch_size=8", f"sft.block_size={tokens}")  # a row a process
        sft = planned("stackllama/sft.yaml", "8xA100-80GB", *keys).role("sft")
        assert 1.2 < (sft.total - sft.parts["libraries"]) / 6.738e9 < 1.4


def test_of_sides_that_take_turns_the_larger_one_counts() -> None:
    keys = ("model.quantization=none", "rollout.engine_args.gpu_memory_utilization=0.5")
    at_once = planned("stackllama/ppo_1_gpu.yaml", "1xA100-80GB", *keys)
    assert "GB on one A100-80GB, which has 81.6 GB for tensors" in reasons(at_once)
    by_turns = planned("stackllama/ppo_1_gpu.yaml", "1xA100-80GB", *keys, "placement.turns=true")
    assert reasons(by_turns) == ""


def test_a_side_that_sleeps_keeps_its_libraries_and_others_never_sleep() -> None:
    held = [
        PlannedRole("generator", 1, 0.25, {"libraries": 2.0, "KV cache": 40.0}),
        PlannedRole("policy", 1, 0.25, {"libraries": 1.0, "weights": 20.0}, start=31.0),
        PlannedRole("critic", 1, 0.25, {"libraries": 1.0, "weights": 20.0}),
        PlannedRole("reward", 1, 0.25, {"libraries": 1.0, "weights": 5.0}),
    ]
    assert together(held, turns=False) == 42 + 31 + 21 + 6
    assert together(held, turns=True) == 2 + (31 + 21) + 6


def test_what_is_trained_stays_on_the_gpu_of_a_side_that_sleeps() -> None:
    trained = {"adapter": 1.0, "gradients": 2.0, "optimizer": 3.0, "reduce buffer": 4.0}
    held = [
        PlannedRole("generator", 1, 0.5, {"libraries": 2.0, "KV cache": 40.0}),
        PlannedRole("policy", 1, 0.5, {"libraries": 1.0, "weights": 20.0, **trained}),
    ]
    assert together(held, turns=True) == (2 + 40) + (1 + 10)


def test_of_mixed_gpus_the_slowest_counts_although_it_has_more_memory() -> None:
    keys = ("policy.num_ranks=16", "ppo.mini_batch_size=64")
    mixed = planned(STACKLLAMA, "1x8xH100-80GB+3x8xA100-80GB", *keys).time
    slow = planned(STACKLLAMA, "4x8xA100-80GB", *keys).time
    assert mixed is not None
    assert slow is not None
    assert mixed.phases["learn"] == slow.phases["learn"]


def test_what_no_gpu_has_confirmed_is_said_to_be_a_prediction() -> None:
    plan = planned(STACKLLAMA, "3x8xA100-80GB")
    assert "predicted, and confirmed by no GPU" in as_text(plan, [])
    measured = dataclasses.replace(plan, confirmed_by="the rehearsal of today")
    assert "confirmed by no GPU" not in as_text(measured, [])
    assert as_json(plan, [])["confirmed_by"] is None


def test_a_model_that_is_neither_here_nor_described_is_refused_with_what_to_add() -> None:
    config = load(None, ["model.path=nobody/model-of-nobody"])
    with pytest.raises(
        DataError, match=r"give its shape for the plan, such as model\.shape=\{num_layers"
    ):
        prediction(config, parse_cluster("8xA100-80GB"))


def test_a_folder_says_more_than_a_shape(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    shape = "{num_layers: 9, hidden_size: 8, num_heads: 1, intermediate_size: 8, vocab_size: 8}"
    keys = [f"model.path={tmp_path}", f"model.shape={shape}"]
    assert prediction(load(None, keys), ()).models.base.shape.num_layers == 2


def test_gpus_of_an_unknown_kind_are_placed_and_not_compared() -> None:
    nodes = [Node("10.0.0.1", 8), Node("10.0.0.2", 8), Node("10.0.0.3", 8)]
    plan = prediction(load(STACKLLAMA), nodes)
    assert plan.fits
    assert len(plan.places) == 32
    assert plan.time is None
    unknown = "the kind of GPUs of 10.0.0.1, 10.0.0.2, 10.0.0.3 is unknown"
    assert unknown in " ".join(plan.assumptions)


def test_a_plan_says_that_it_knows_no_refills() -> None:
    keys = ["ppo.advantage=grpo", "ppo.samples_per_prompt=8", "rollout.shard_size=8"]
    cluster = parse_cluster("3x8xA100-80GB")
    without = prediction(load(STACKLLAMA, keys), cluster)
    plan = prediction(load(STACKLLAMA, [*keys, "ppo.filter_groups.max_refills=3"]), cluster)
    (note,) = set(plan.assumptions) - set(without.assumptions)
    assert note.startswith("ppo.filter_groups.max_refills 3: how many prompts are replaced")
    assert plan.time == without.time


def test_in_a_ray_job_the_cluster_that_the_run_joins_is_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = load(STACKLLAMA, ["cluster.mode=auto"])
    nodes = parse_cluster("3x8xA100-80GB")
    monkeypatch.setattr("rlhf_ray.planning.plan.live_cluster", lambda: nodes)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_JOB_ID", "1")
    assert prediction_for(config).nodes == nodes
    monkeypatch.delenv("RAY_JOB_ID")
    assert prediction_for(config).nodes != nodes


def test_without_gpus_the_machines_memory_is_what_there_is(monkeypatch: Any) -> None:
    config = load(QUICKSTART)
    assert prediction(config, ()).fits
    monkeypatch.setattr("rlhf_ray.planning.prediction.memory_of_machine", lambda: GB)
    plan = prediction(config, ())
    assert "PPO's roles need" in reasons(plan)
    assert "GB of this machine's 1.0 GB of memory" in reasons(plan)


def test_idle_gpus_are_those_that_wait_for_other_phases() -> None:
    plan = planned(STACKLLAMA, "3x8xA100-80GB")
    assert plan.time is not None
    phases = {name: sum(what) / 2 for name, what in plan.time.phases.items()}
    total = sum(phases.values())
    busy = {
        "generators": phases["gen"] + phases["sync"],
        "policy": phases["score"] + phases["learn"] + phases["commit"],
        "critic and scorers": phases["score"] + phases["learn"] + phases["commit"],
    }
    idle = sum(8 * (total - seconds) for seconds in busy.values())
    assert plan.time.idle_gpu_hours == pytest.approx(idle * 2500 / 3600)


def test_a_shape_is_no_part_of_what_a_run_is() -> None:
    assert not [key for key in fixed_keys(Config) if ".shape" in key]


def test_parts_of_nothing_are_left_out() -> None:
    role = planned(STACKLLAMA, "3x8xA100-80GB", "reference.kind=own").role("reference")
    assert set(memory_gb(role)) == {"libraries", "weights", "activations", "logits", "total"}


@pytest.mark.parametrize(
    ("path", "keys", "time"),
    [
        ("stackllama/sft.yaml", [], r"days of the run: 0\.49 to 1\.54"),
        ("stackllama/prepare.yaml", [], "hours of the run: <0.01"),
        ("domain_pretraining.yaml", [], "time of the run: not estimated, because of pretrain"),
        (
            "domain_pretraining.yaml",
            ["pretrain.epochs=null"],
            r"hours of the run: <0\.01 to 0\.\d+",
        ),
    ],
)
def test_the_plan_of_supervised_stages_says_nothing_of_ppo(
    path: str, keys: list[str], time: str
) -> None:
    plan = planned(path, "8xA100-80GB", *keys)
    text = as_text(plan, [])
    assert re.search(time, text)
    assert "days of the run: 0.00" not in text
    for word in ("generator", "critic", "DeepSpeed", "ppo:", "rollouts (", "decoding"):
        assert word not in text


def test_the_plan_of_an_evaluation_lists_what_it_runs() -> None:
    plan = planned(QUICKSTART, "1xA100-80GB", "run.stages=[evaluate]")
    _, _, table = as_text(plan, []).partition("\nrole ")
    listed = [line.split()[0] for line in table.partition("\nmodel ")[0].splitlines() if line]
    assert listed == ["workers", "generator", "reward"]
