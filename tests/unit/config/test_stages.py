"""The registry of stages against what it names."""

import typing

import pytest

from rlhf_ray.config import Config
from rlhf_ray.config.data import DataConfig
from rlhf_ray.config.stages import DEFAULT_STAGES, POLICIES, STAGES, SUPERVISED, StageName
from rlhf_ray.config.supervised import SupervisedConfig


def test_every_name_that_a_config_may_use_has_an_entry_in_pipeline_order() -> None:
    assert tuple(STAGES) == typing.get_args(StageName)


@pytest.mark.parametrize("name", STAGES)
def test_an_entry_names_what_is_there(name: str) -> None:
    stage = STAGES[name]
    assert callable(stage.load())
    assert set(stage.sections) <= set(Config.model_fields)
    assert set(stage.datasets) <= set(DataConfig.model_fields)
    assert set(stage.after) < set(STAGES)
    assert list(stage.after) == [other for other in STAGES if other in stage.after]


def test_the_supervised_ones_are_those_with_a_section_of_that_kind() -> None:
    sections = {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, SupervisedConfig)
    }
    assert tuple(name for name in STAGES if name in sections) == SUPERVISED


def test_rank_and_dpo_run_where_they_are_asked_for_alone() -> None:
    assert tuple(name for name in STAGES if name not in ("rank", "dpo")) == DEFAULT_STAGES
    assert POLICIES == ("sft", "dpo", "ppo")
