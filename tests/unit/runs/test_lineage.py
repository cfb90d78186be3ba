from pathlib import Path

import pytest

from rlhf_ray.config import load
from rlhf_ray.config.rewards import ClassifierSourceConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.runs.lineage import lineage


def test_a_card_shows_no_secrets(tmp_path: Path) -> None:
    overrides = [f"run.dir={tmp_path}", "sft.trainer={optim: sgd}"]
    login = {"type": "classifier", "path": "https://u:s3cret@h/model"}
    with pytest.raises(ConfigError, match=r"rewards\.path: a login or key stands here"):
        load(None, [*overrides, f"rewards=[{login}]"])
    # A Config that was built by hand may hold one all the same.
    classifier = ClassifierSourceConfig.model_validate(login)
    config = load(None, overrides).model_copy(update={"rewards": [classifier]})
    history = lineage(config, "ppo")
    assert history.settings["sft"]["trainer"] == {"optim": "sgd"}
    assert history.settings["rewards"][0]["path"] == "https://...@h/model"
    assert [step.result for step in history.steps] == ["classifier https://...@h/model"]
