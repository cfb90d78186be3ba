"""Refusals of the section evaluate, by the key's full name."""

from typing import Any

import pytest

from rlhf_ray.config import resolve
from rlhf_ray.errors import ConfigError

JUDGE = {"url": "http://localhost:8000/v1", "model": "m"}


def test_models_and_judges_by_name() -> None:
    models = ["sft", "ppo", "ppo@12", "ppo@best", "runs/other/checkpoints/latest/policy"]
    given = {"models": models, "judged_by": ["judge", "rouge"], "judge": JUDGE}
    config = resolve({"evaluate": given}).evaluate
    assert config.models == models
    assert config.judge is not None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"models": ["ppo@newest"]}, r"evaluate\.models: .*'ppo@newest' is not a version"),
        ({"models": ["ppo", "dpo", "ppo"]}, r"evaluate\.models: .*names ppo more than once"),
        ({"models": ["prompt"]}, r"write a folder of that name as \./prompt"),
        ({"models": []}, r"evaluate\.models"),
        ({"judged_by": ["taste"]}, r"evaluate\.judged_by.*'taste'"),
        (
            {"judged_by": ["reward", "reward"]},
            r"evaluate\.judged_by: names reward more than once",
        ),
        ({"judged_by": ["judge"]}, r"names judge, but evaluate\.judge is not set"),
        ({"judge": JUDGE}, r"evaluate\.judge is set, but evaluate\.judged_by does not name judge"),
        ({"judge": JUDGE | {"template": "{a}"}}, r"evaluate\.judge\.template.*lacks \{b\}"),
    ],
)
def test_what_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve({"evaluate": given})
