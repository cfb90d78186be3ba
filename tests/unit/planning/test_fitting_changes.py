"""What the plan says of too few GPUs: which change would make it fit."""

import json

from shipped_plans import CONFIGS, planned, reasons
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.planning.layout_options import changed
from rlhf_ray.planning.prediction import prediction
from rlhf_ray.planning.suggestions import fitting_changes


def test_too_few_gpus_are_told_with_what_would_fit() -> None:
    keys = ["placement={}", "generators.num=3", "policy.num_ranks=2", "critic.num_ranks=1"]
    keys += ["reference.kind=own", "reward.num_workers=1", "rollout.engine_args={}"]
    keys += ["ppo.max_tokens_per_micro_batch=8192"]
    plan = planned("stackllama/ppo_1x8_a100.yaml", "1x4xA100-80GB", *keys)
    assert "The roles do not fit on the cluster" in reasons(plan)
    assert plan.time is None
    path = str(CONFIGS / "stackllama/ppo_1x8_a100.yaml")
    arguments = ["plan", path, *keys, "placement.gpus=1", "--cluster", "4xA100-80GB"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert result.output.count("It would fit with") == 1
    assert "It would fit with:\n  reference.kind=policy_base" in result.output
    found = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)
    (reason,) = found["reasons"]
    assert reason.endswith("Available: node-0 4; in total 4")
    assert found["changes"]


def test_ranks_that_share_gpus_are_fewer_on_fewer_gpus() -> None:
    plan = planned("stackllama/ppo_1x8_a100.yaml", "4xA100-80GB")
    assert "The roles do not fit on the cluster" in reasons(plan)
    (change,) = fitting_changes(plan)
    fewer = ("policy.num_ranks", "critic.num_ranks", "generators.num", "reward.num_workers")
    assert {change[key] for key in fewer} == {4}
    assert prediction(changed(plan.config, change), plan.nodes).fits


def test_where_no_change_would_do_the_layout_says_what_would() -> None:
    path = str(CONFIGS / "models/qwen25_32b_tp.yaml")
    arguments = ["plan", path, "--cluster", "4xA100-40GB"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 1
    assert result.output.count("It would fit") == 1
    found = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)
    assert not found["changes"]
    (reason,) = found["reasons"]
    assert reason.endswith("in total 4. It would fit with 3 more nodes of 4 GPUs")


def test_weights_that_do_not_fit_whole_are_divided_and_the_plan_says_what_that_takes() -> None:
    keys = ("pretrain.zero_stage=null", "pretrain.gradient_checkpointing=false")
    path = "stackllama/full_3x8_a100.yaml"
    plan = planned(path, "3x8xA100-80GB", *keys, "run.stages=[pretrain]")
    assert {"pretrain.zero_stage": 3} in fitting_changes(plan)
    needed = prediction(changed(plan.config, {"pretrain.zero_stage": 3}), plan.nodes)
    arguments = ["plan", str(CONFIGS / path), *keys, "run.stages=[pretrain]"]
    result = CliRunner().invoke(cli.app, [*arguments, "--cluster", "3x8xA100-80GB"])
    assert result.exit_code == 1
    takes = needed.role("pretrain").total / 1e9
    assert f"pretrain.zero_stage=3; pretrain {takes:.2f} GB" in result.output


def test_every_change_that_is_named_makes_it_fit() -> None:
    keys = [f"{name}.gradient_checkpointing=false" for name in ("policy", "critic", "reward")]
    plan = planned("models/qwen25_0_5b_1gpu.yaml", "1xA10G-24GB", *keys)
    assert not plan.fits
    changes = fitting_changes(plan)
    assert changes
    for change in changes:
        more = [f"{key}={json.dumps(value)}" for key, value in change.items()]
        again = planned("models/qwen25_0_5b_1gpu.yaml", "1xA10G-24GB", *keys, *more)
        assert again.fits, change


def test_where_single_changes_do_not_help_a_layout_that_fits_is_named() -> None:
    plan = planned("models/qwen25_32b_tp.yaml", "4xA100-80GB")
    (change,) = fitting_changes(plan)
    assert change["reference.kind"] == "policy_base"
    assert prediction(changed(plan.config, change), plan.nodes).fits
