from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_ray.config import Config, load
from rlhf_ray.config.identity import adjustments, differences, fixed_keys, settled
from rlhf_ray.config.stages import STAGES

ALL = tuple(STAGES)[:-1]


def changed(*overrides: str, begun: tuple[str, ...] = ALL) -> list[tuple[str, Any, Any]]:
    """Return the keys that overrides change in a run of the defaults."""
    return differences(Config().model_dump(mode="json"), load(None, overrides), begun)


def test_the_same_config_is_the_same_run() -> None:
    assert changed() == []


@pytest.mark.parametrize(
    "override",
    [
        "ppo.iterations=7",
        "ppo.save_every=1",
        "ppo.eval_every=3",
        "generators.num=4",
        "generators.max_restarts=0",
        "rollout.autoscale={maximum: 4}",
        "policy.num_ranks=2",
        "policy.zero_stage=3",
        "cluster.mode=ray",
        "cluster.call_timeout_s=5",
        "rollout.engine=transformers",
        "rollout.shard_size=4",
        "ppo.max_tokens_per_micro_batch=4096",
        "run.stages=[ppo]",
        "run.name=elsewhere",
        "evaluate.num_prompts=5",
        "model.attn_implementation=eager",
    ],
)
def test_how_far_and_where_may_change(override: str) -> None:
    assert changed(override) == []


@pytest.mark.parametrize(
    ("override", "old", "new"),
    [
        ("ppo.gamma=0.5", 1.0, 0.5),
        ("ppo.batch_size=128", 64, 128),
        ("sft.eval_every=5", None, 5),
        ("lora.r=8", 16, 8),
        ("critic.lora.alpha=8", 32.0, 8.0),
        ("model.path=x", None, "x"),
        ("model.tiny.hidden_size=64", 128, 64),
        ("run.seed=3", 0, 3),
        ("rollout.temperature=0.7", 1.0, 0.7),
        ("sft.steps=5", 300, 5),
        ("prepare.posts=p.xml", None, "p.xml"),
    ],
)
def test_model_data_and_algorithm_may_not(override: str, old: Any, new: Any) -> None:
    assert changed(override) == [(override.partition("=")[0], old, new)]


def test_a_users_set_may_not_be_swapped() -> None:
    ((key, old, new),) = changed("data.prompts.path=p.jsonl")
    assert (key, old, new[0]["path"]) == ("data.prompts", None, "p.jsonl")


def test_a_change_matters_once_a_stage_that_reads_it_has_begun() -> None:
    assert changed("ppo.gamma=0.5", begun=("prepare", "sft")) == []
    assert changed("sft.steps=5", begun=("prepare", "pretrain")) == []
    assert changed("sft.steps=5", begun=("prepare", "sft")) != []
    assert changed("reward.centre=1", begun=("reward",)) != []
    assert changed("rewards=[{type: rouge}]", begun=("reward",)) == []
    assert changed("rewards=[{type: rouge}]", begun=("reward", "ppo")) != []
    assert changed("model.path=x", begun=()) == []


def test_a_key_that_is_newer_than_the_run_had_its_default() -> None:
    saved = Config().model_dump(mode="json")
    del saved["ppo"]["gamma"]
    assert differences(saved, Config(), ALL) == []
    now = load(None, ["ppo.gamma=0.5"])
    assert differences(saved, now, ALL) == [("ppo.gamma", 1.0, 0.5)]


def test_every_section_with_fixed_keys_is_read_by_a_stage() -> None:
    sections = {key.partition(".")[0] for key in fixed_keys(Config)}
    assert sections == {section for stage in STAGES.values() for section in stage.sections}


def test_a_given_sft_model_belongs_to_what_was_trained_on_it() -> None:
    for stage in ("reward", "dpo", "ppo"):
        odd = changed("sft.path=/another/model", begun=(stage,))
        assert odd == [("sft.path", None, "/another/model")], stage
    assert changed("sft.path=/another/model", begun=("prepare", "pretrain")) == []


ADJUSTABLE = (
    "ppo.learning_rate=1e-6",
    "critic.learning_rate=1e-6",
    "ppo.epochs=1",
    "ppo.mini_batch_size=16",
    "ppo.max_grad_norm=0.5",
    "ppo.clip_range=0.1",
    "ppo.clip_range_high=0.3",
    "ppo.dual_clip=3",
    "ppo.value_clip_range=0.1",
    "ppo.kl_coef=0.5",
    "ppo.kl_target=3",
    "ppo.kl_horizon=20000",
    "ppo.entropy_coef=0.01",
    "ppo.importance_cap=2.0",
    "ppo.scheduler=cosine",
    "ppo.warmup_iterations=3",
    "ppo.critic_warmup=3",
    "ppo.stop_kl=0.1",
    "ppo.redraw_mini_batches=true",
    "ppo.adam_epsilon=1e-6",
    "ppo.gae_lambda=0.9",
    "ppo.missing_eos_penalty=1",
    "ppo.overlong.buffer=4",
    "ppo.overlong.penalty=2",
    "ppo.overlong.per_token=0.01",
    "ppo.overlong.truncated=mask",
    "ppo.importance_mask={high: 2.0}",
    "sft.weight_decay=0.1",
    "sft.scheduler=linear",
    "sft.final_lr_share=0.1",
    "sft.warmup_steps=5",
    "sft.warmup_share=0.1",
    "dpo.beta=0.2",
    "dpo.label_smoothing=0.1",
    "sft.learning_rate=1e-6",
    "reward.learning_rate=1e-6",
    "dpo.learning_rate=1e-6",
    "pretrain.learning_rate=1e-6",
    "data.overlong=truncate",
    "model.max_length=300",
)


@pytest.mark.parametrize("override", ADJUSTABLE)
def test_what_a_run_is_steered_by_may_change_and_is_recorded(override: str) -> None:
    assert changed(override) == []
    saved, key = Config().model_dump(mode="json"), override.partition("=")[0]
    ((name, _, new),) = adjustments(saved, load(None, [override]), ALL)
    given = yaml.safe_load(override.partition("=")[2].replace("1e-6", "1.0e-6"))
    assert name == key
    assert new == given or given.items() <= new.items()


def test_each_recorded_key_within_a_section_is_compared() -> None:
    """A section that were marked itself would be passed over with all its keys."""

    def sections(model: type[BaseModel]) -> Iterator[FieldInfo]:
        for field in model.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield field
                yield from sections(field.annotation)

    marked: list[Any] = [field.json_schema_extra or {} for field in sections(Config)]
    assert not any(extra.get("recorded") for extra in marked)


def test_a_sources_clip_and_scale_may_change_and_are_recorded() -> None:
    saved = load(None, ["rewards=[{type: model}]"]).model_dump(mode="json")
    now = load(None, ["rewards=[{type: model, clip: 2.0, scale: running}]"])
    assert differences(saved, now, ALL) == []
    ((key, _, new),) = adjustments(saved, now, ALL)
    found = {"weight": 1.0, "scale": "running", "clip": 2.0, "on_bad_score": "error"}
    assert (key, new) == ("rewards", [found])


@pytest.mark.parametrize(
    "remedy",
    [
        "on_bad_score: skip",
        "on_bad_answer: skip",
        "on_bad_answer: score, bad_answer_score: 1.0",
        "pattern: '(.)'",
        "template: 'rate {response}'",
    ],
)
def test_what_the_errors_of_a_source_advise_may_change_and_is_recorded(remedy: str) -> None:
    judge = "type: judge, url: 'http://j/v1', model: m"
    saved = load(None, [f"rewards=[{{{judge}, on_bad_answer: error}}]"]).model_dump(mode="json")
    given = remedy if "on_bad_answer" in remedy else f"{remedy}, on_bad_answer: error"
    now = load(None, [f"rewards=[{{{judge}, {given}}}]"])
    assert differences(saved, now, ALL) == []
    assert [key for key, _, _ in adjustments(saved, now, ALL)] == ["rewards"]


def test_a_dataset_matters_to_the_stages_that_read_it() -> None:
    assert changed("data.eval.path=e.jsonl", begun=("sft", "reward")) == []
    assert changed("data.eval.path=e.jsonl", begun=("sft", "ppo")) != []


def test_values_of_stages_that_are_not_requested_stay_where_the_config_is_silent() -> None:
    saved = load(None, ["prepare.posts=p.xml", "prepare.max_pairs=3"]).model_dump(mode="json")
    changes = differences(saved, Config(), ("prepare",))
    kept = {"prepare.posts": "p.xml", "prepare.max_pairs": 3}
    assert settled(saved, Config(), changes, ("sft", "reward")) == kept
    assert settled(saved, Config(), changes, ("prepare", "sft")) == {}, "requested again"
    other = load(None, ["prepare.posts=q.xml"])
    changes = differences(saved, other, ("prepare",))
    assert settled(saved, other, changes, ("sft",)) == {"prepare.max_pairs": 3}
    saved = load(None, ["model.path=m"]).model_dump(mode="json")
    changes = differences(saved, Config(), ("pretrain",))
    assert settled(saved, Config(), changes, ("sft",)) == {}, "a requested stage reads it"
