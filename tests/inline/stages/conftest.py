"""Run folders as the stage prepare leaves them, for the supervised stages."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepared_runs import make_config, write_prepared
from tiny_models import with_random_adapter

from rlhf_ray.config import Config
from rlhf_ray.models import loading


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Config]:
    """Makes a prepared run folder, and the config that goes with it."""

    def make(name: str = "run", **sections: dict[str, Any]) -> Config:
        write_prepared(tmp_path / name)
        return make_config(tmp_path / name, **sections)

    return make


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, dict[str, Any]]:
    """A run through pretrain, sft and reward, and the summaries that they returned."""
    from rlhf_ray.stages.supervised import pretrain, sft
    from rlhf_ray.stages.supervised import reward as reward_model

    folder = tmp_path_factory.mktemp("trained") / "run"
    write_prepared(folder)
    config = make_config(folder)
    summaries = {
        "pretrain": pretrain.run(config),
        "sft": sft.run(config),
        "reward": reward_model.run(config),
    }
    return config, summaries


@pytest.fixture(scope="session")
def policy_run(
    trained_run: tuple[Config, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """A copy of the trained run, with a policy of version 3: the SFT model with noise on it."""
    source, _ = trained_run
    folder = tmp_path_factory.mktemp("policy") / "run"
    shutil.copytree(source.run.dir, folder)
    config = source.model_copy(update={"run": source.run.model_copy(update={"dir": str(folder)})})
    sft_model = str(folder / "sft" / "model")
    model = with_random_adapter(sft_model, config.model, r=2, deviation=0.1)
    policy = folder / "checkpoints" / "3" / "policy"
    loading.save_adapter(model, loading.load_tokenizer(sft_model), policy, sft_model)
    (policy / "learner.safetensors").write_bytes(b"state")
    (folder / "checkpoints" / "latest").symlink_to("3", target_is_directory=True)
    (folder / "ppo").mkdir()
    (folder / "ppo" / "summary.json").write_text('{"iterations": 3, "kl_last": 0.5}')
    (folder / "prepare" / "summary.json").write_text('{"synthetic": false}')
    return config
