from pathlib import Path

from rlhf_ray.config import load
from rlhf_ray.runs.lineage import lineage


def test_a_card_shows_no_secrets(tmp_path: Path) -> None:
    config = load(
        None,
        [
            f"run.dir={tmp_path}",
            "sft.trainer={optim: sgd}",
            "rewards=[{type: classifier, path: 'https://u:s3cret@h/model'}]",
        ],
    )
    history = lineage(config, "ppo")
    assert history.settings["sft"]["trainer"] == {"optim": "sgd"}
    assert history.settings["rewards"][0]["path"] == "https://...@h/model"
    assert [step.result for step in history.steps] == ["classifier https://...@h/model"]
