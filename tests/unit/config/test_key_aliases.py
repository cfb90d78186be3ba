import tomllib
from pathlib import Path

import pytest

from rlhf_ray.config import load
from rlhf_ray.config.key_aliases import SUPERVISED, KeyAlias, aliases, hints, markdown
from rlhf_ray.config.load import keys
from rlhf_ray.errors import ConfigError

ROOT = Path(__file__).parents[3]
KNOWN = set(keys())


def systems() -> list[KeyAlias]:
    return [row for heading, rows in aliases().items() if heading != SUPERVISED for row in rows]


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(None, overrides)
    return str(caught.value)


def test_the_table_ships_with_the_package_and_parses() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = pyproject["tool"]["setuptools"]["package-data"]["rlhf_ray.config"]
    assert shipped == ["key_aliases.txt"]
    assert list(aliases()) == ["TRL", SUPERVISED, "OpenRLHF", "verl"]
    assert all(len(rows) > 20 for rows in aliases().values())
    (quantized,) = [row for row in aliases()["TRL"] if row.name == "load_in_8bit"]
    assert quantized == KeyAlias("TRL", "load_in_8bit", "model.quantization", "int8")


def test_every_key_of_ours_in_the_table_exists() -> None:
    stages = ("pretrain", "sft", "reward", "dpo")
    rows = [row for named in aliases().values() for row in named]
    absent = [r for r in rows if not any(r.for_stage(stage).ours in KNOWN for stage in stages)]
    assert not absent


def test_no_alias_is_a_key_of_ours_that_takes_a_value() -> None:
    sections = {key.rpartition(".")[0] for key in KNOWN}
    assert not [row for row in systems() if row.name in KNOWN - sections]


def test_no_system_has_a_name_twice() -> None:
    named = [(row.system, row.name) for row in systems()]
    assert len(named) == len(set(named))


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        (
            "per_device_train_batch_size=4",
            "TRL's per_device_train_batch_size is our ppo.mini",
        ),
        (
            "ppo.num_ppo_epochs=4",
            "ppo.num_ppo_epochs: unknown key. TRL's num_ppo_epochs is our",
        ),
        ("ppo.init_kl_coef=0.1", "TRL and OpenRLHF's init_kl_coef is our ppo.kl_coef."),
        ("ppo.vf_coef=0.1", "is our critic.learning_rate (the critic has its own optimizer"),
        ("ppo.cliprange=0.1", "TRL's cliprange is our ppo.clip_range."),
        ("response_length=53", "is our rollout.max_tokens."),
        ("sft.per_device_train_batch_size=2", "is our sft.batch_size (theirs is per device"),
        ("reward.num_train_epochs=2", "TRL's num_train_epochs is our reward.epochs."),
        ("pretrain=m", "got 'm'. OpenRLHF's pretrain is our model.path (with sft in run.stages"),
        (
            "n_samples_per_prompt=4",
            "OpenRLHF's n_samples_per_prompt is our ppo.samples_per_prompt.",
        ),
        (
            "n-samples-per-prompt=4",
            "OpenRLHF's n_samples_per_prompt is our ppo.samples_per_prompt.",
        ),
        ("advantage_estimator=gae", "OpenRLHF's advantage_estimator is our ppo.advantage ("),
        ("vllm_num_engines=4", "OpenRLHF's vllm_num_engines is our generators.num."),
        ("algo.kl.init_coef=0.1", "OpenRLHF's algo.kl.init_coef is our ppo.kl_coef."),
        ("actor_rollout_ref.rollout.n=4", "verl's actor_rollout_ref.rollout.n is our ppo.samples"),
        ("algorithm.adv_estimator=gae", "verl's algorithm.adv_estimator is our ppo.advantage"),
        ("data.train_files=x", "our data.prompts ({path: FILE, format: verl})"),
        ("critic.model.path=x", "verl's critic.model.path is our critic.path."),
    ],
)
def test_a_name_of_another_system_is_answered_with_ours(override: str, hint: str) -> None:
    message = refused(override)
    assert hint in message
    assert "Did you mean" not in message


def test_each_key_of_another_systems_section_is_named_and_its_values_are_not_repeated() -> None:
    message = refused("algorithm={gamma: 1.0, lam: 0.9, no_such_key: 777}")
    assert "verl's algorithm.gamma is our ppo.gamma." in message
    assert "verl's algorithm.lam is our ppo.gae_lambda." in message
    assert "777" not in message
    assert "s3cret" not in refused("use_wandb=s3cret")


def test_a_key_that_no_system_has_gets_no_hint() -> None:
    assert hints("ppo.gama", 1, KNOWN) == []
    assert hints("lora_r", 1, {"ppo"}) == []


def test_the_page_is_up_to_date() -> None:
    if (ROOT / "docs" / "other_names.md").read_text() != markdown():
        pytest.fail("docs/other_names.md is out of date: run scripts/docs.sh")
