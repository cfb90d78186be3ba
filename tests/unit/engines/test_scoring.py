"""Construction of reward sources from a config."""

from typing import Literal

import pytest
from pydantic import Field

from rlhf_ray.config import resolve
from rlhf_ray.config.rewards import SourceConfig
from rlhf_ray.engines.scoring import reward_sources


class ForgottenSourceConfig(SourceConfig):
    """A kind of source that nothing builds."""

    type: Literal["forgotten"] = Field(default="forgotten")


def test_a_kind_of_source_that_nothing_builds_is_refused() -> None:
    config = resolve({}).model_copy(update={"rewards": [ForgottenSourceConfig()]})
    with pytest.raises(AssertionError, match="ForgottenSourceConfig"):
        reward_sources(config, None, "")
