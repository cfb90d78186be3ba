"""Supervised stages under ZeRO: two ranks train what one process trains, and go on as they were."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked_ranks import in_group
from prepared_runs import config_values, make_config, write_prepared
from safetensors.torch import load_file
from supervised_ranks import rank_main, train_stage

from rlhf_ray.stages.pipeline import run_single

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("nothing_compiled"),
]

GATHERED = {"zero": {"stage3_param_persistence_threshold": 0}}
"""Small weights would stay on every rank: at stage 3, have each of them gathered."""
STEPS = {"steps": 4, "batch_size": 8, "learning_rate": 0.003}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "run"
    write_prepared(folder)
    run_single(make_config(folder), "pretrain")
    return str(folder / "pretrain" / "model")


def write_run(folder: Path, base: str, stage: str, **keys: Any) -> str:
    """A prepared run folder of one stage and its config, in a file."""
    write_prepared(folder)
    own = {"eval_rows": 19} if stage in ("reward", "dpo") else {"block_size": 32}
    values = config_values(folder, model={"path": base, "max_length": 64})
    values |= {"cluster": {"mode": "local"}, stage: STEPS | own | keys}
    config = folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(values))
    return str(config)


def learnt(out: Path) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    return json.loads((out / "numbers.json").read_text()), load_file(out / "weights.safetensors")


def require_same(found: Path, expected: Path, atol: float = 1e-5) -> None:
    numbers, weights = learnt(found)
    wanted, wanted_weights = learnt(expected)
    for name, value in wanted.items():
        if name != "processes":
            assert numbers[name] == pytest.approx(value, abs=1e-5), name
    assert set(weights) == set(wanted_weights)
    for name, weight in wanted_weights.items():
        torch.testing.assert_close(weights[name], weight, atol=atol, rtol=0, msg=name)


def train(world: int, config: str, stage: str, out: Path, killed: int = 0) -> None:
    in_group(rank_main, world, config, stage, str(out), killed)


def zero(stage: int) -> dict[str, Any]:
    return {"zero_stage": stage} | ({"deepspeed": GATHERED} if stage == 3 else {})


TUNED: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "sft": {"tuning": "full"},
    "reward": {"tuning": "full"},
    "sft adapter": {"lora": {"dropout": 0.0}},
    "reward adapter": {"lora": {"dropout": 0.0}},
    "dpo": {},
}


@pytest.fixture(scope="module")
def trained_by_one(tmp_path_factory: pytest.TempPathFactory, base: str) -> Callable[..., Path]:
    """Trains a stage in one process, once for the tests that compare with it; gives its folder."""

    @cache
    def one(tuned: str, how: str = "") -> Path:
        stage, folder = tuned.split()[0], tmp_path_factory.mktemp("one")
        keys = TUNED[tuned] | (HARDER[how] if how else {})
        train_stage(write_run(folder / "run", base, stage, **keys), stage, folder / "learnt")
        return folder

    return one


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("tuned", TUNED)
def test_two_ranks_train_what_one_process_trains(
    tmp_path: Path, base: str, trained_by_one: Callable[..., Path], tuned: str, zero_stage: int
) -> None:
    stage, keys = tuned.split()[0], TUNED[tuned]
    config = write_run(tmp_path / "run", base, stage, train_workers=2, **keys, **zero(zero_stage))
    train(2, config, stage, tmp_path / "learnt")
    require_same(tmp_path / "learnt", trained_by_one(tuned) / "learnt")
    curves = [
        (folder / "run" / stage / "metrics.jsonl").read_text().splitlines()
        for folder in (trained_by_one(tuned), tmp_path)
    ]
    for one, two in zip(*curves, strict=True):
        assert json.loads(two) == pytest.approx(json.loads(one), abs=1e-5)


SAVED = {"trainer": {"save_steps": 2}, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory, base: str) -> Callable[..., Path]:
    """Trains a stage to its end, once for every number of ranks that resumes a killed one."""

    @cache
    def whole(stage: str, zero_stage: int, ranks: int) -> Path:
        folder, keys = tmp_path_factory.mktemp("whole"), TUNED[stage] | zero(zero_stage) | SAVED
        config = write_run(folder / "run", base, stage, train_workers=ranks, **keys)
        train(ranks, config, stage, folder / "learnt")
        return folder / "learnt"

    return whole


@pytest.mark.parametrize(
    ("stage", "zero_stage", "ranks", "then_ranks"),
    [
        *(("sft", 2, 2, 2), ("sft", 2, 2, 1), ("sft", 1, 1, 2)),
        *(("sft", 3, 2, 2), ("sft", 3, 2, 1), ("reward", 3, 1, 2)),
        *(("dpo", 3, 2, 2), ("dpo", 3, 2, 1), ("dpo", 2, 1, 2)),
    ],
)
def test_a_killed_training_goes_on_in_as_many_processes_or_others(
    tmp_path: Path,
    base: str,
    never_killed: Callable[..., Path],
    stage: str,
    zero_stage: int,
    ranks: int,
    then_ranks: int,
) -> None:
    keys = TUNED[stage] | zero(zero_stage) | SAVED
    config = write_run(tmp_path / "killed", base, stage, train_workers=ranks, **keys)
    with pytest.raises(AssertionError, match="a rank has failed"):
        train(ranks, config, stage, tmp_path / "of_killed", killed=2)
    assert not (tmp_path / "of_killed").exists()
    config = write_run(tmp_path / "killed", base, stage, train_workers=then_ranks, **keys)
    train(then_ranks, config, stage, tmp_path / "of_killed")
    exact = 0.0 if ranks == then_ranks else 1e-5
    whole = never_killed(stage, zero_stage, ranks)
    require_same(tmp_path / "of_killed", whole, atol=exact)
    checkpoint = tmp_path / "killed" / stage / "trainer" / "checkpoint-2"
    assert (checkpoint / "latest_universal").exists() == (ranks != then_ranks)


HARDER: dict[str, dict[str, Any]] = {
    "recomputed": {"gradient_checkpointing": True},
    "accumulated": {"trainer": {"gradient_accumulation_steps": 2}},
    "offloaded": {},
    "partly frozen": {"unfreeze": ["model.layers.0", "lm_head"]},
}


@pytest.mark.parametrize("zero_stage", [2, 3])
@pytest.mark.parametrize("how", HARDER)
def test_what_else_is_set_changes_nothing(
    tmp_path: Path, base: str, trained_by_one: Callable[..., Path], how: str, zero_stage: int
) -> None:
    keys = TUNED["sft"] | HARDER[how] | zero(zero_stage)
    if how == "offloaded":
        device = {"device": "cpu"}
        held = {"offload_optimizer": device} | ({"offload_param": device} if zero_stage > 2 else {})
        keys |= {"deepspeed": {"zero": held}}
    config = write_run(tmp_path / "two", base, "sft", train_workers=2, **keys)
    train(2, config, "sft", tmp_path / "together")
    require_same(tmp_path / "together", trained_by_one("sft", how) / "learnt")


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_whole_reward_model_in_half_precision_keeps_its_head_in_fp32(
    tmp_path: Path, base: str, zero_stage: int
) -> None:
    half = {"path": base, "max_length": 64, "dtype": "bfloat16"}
    found = {}
    for world, keys in ((1, {}), (2, zero(zero_stage) | {"train_workers": 2})):
        keys = keys | {"tuning": "full", "gradient_checkpointing": True}
        config = Path(write_run(tmp_path / f"run{world}", base, "reward", **keys))
        config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"model": half}))
        if world == 1:
            train_stage(str(config), "reward", tmp_path / "1")
        else:
            train(world, str(config), "reward", tmp_path / "2")
        found[world] = learnt(tmp_path / f"{world}")
    (one, _), (two, weights) = found[1], found[2]
    assert two["after_loss"] == pytest.approx(one["after_loss"], abs=0.01)
    assert abs(two["after_loss"] - two["before_loss"]) > 0.02
    head = weights.pop("score.weight")
    assert head.dtype == torch.float32
    assert (head != head.bfloat16()).any()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
