"""A critic that starts from the reward model, whole or in PEFT form, and keeps its head."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.critic_learner import CriticLearner
from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.models.adapters import attach
from rlhf_ray.models.forward import ValueModel, response_values
from rlhf_ray.models.loading import load_sequence_classifier, load_tokenizer, save_adapter
from rlhf_ray.models.merging import merge_adapter
from rlhf_ray.types import Rollout

CRITIC = {"init": "reward", "learning_rate": 1e-2, "lora": {"r": 4}}


@pytest.fixture(params=["adapter", "merged"])
def reward_model(request: pytest.FixtureRequest, base: str, tmp_path: Path) -> str:
    """A reward model with a head and an adapter that are not zero."""
    model = load_sequence_classifier(base, ModelConfig(), seed=5)
    wrapped = attach(model, LoraConfig(r=2), "SEQ_CLS", seed=3, dropout=0.0)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    save_adapter(wrapped, load_tokenizer(base), tmp_path / "reward", base)
    if request.param == "merged":
        merge_adapter(base, str(tmp_path / "reward"), tmp_path / "merged", ModelConfig())
        return str(tmp_path / "merged")
    return str(tmp_path / "reward")


def values_of(path: str, rollouts: list[Rollout]) -> list[np.ndarray]:
    model = ValueModel(load_sequence_classifier(path, ModelConfig(), require_head=True))
    return response_values(model, rollouts, max_tokens=1000, device=torch.device("cpu"))


def test_it_starts_with_the_scores_of_unfinished_answers(
    reward_model: str, base: str, rollouts: list[Rollout], make_config: Any
) -> None:
    critic = CriticLearner("critic-0", make_config(critic=CRITIC), reward_model, "torch")
    critic.start()
    values, _ = critic.values(rollouts)
    for ours, theirs in zip(values, values_of(reward_model, rollouts), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert np.abs(np.concatenate(values)).max() > 0.1
    # Its own adapter and the head learn; the reward model's adapter is part of the base.
    trained = [n for n, p in critic._engine.module.named_parameters() if p.requires_grad]
    assert sum("lora_A.default" in name for name in trained) == 7
    assert sum("score.modules_to_save.default" in name for name in trained) == 1
    assert len(trained) == 2 * 7 + 1


def test_what_it_learnt_is_loaded_from_its_folder(
    reward_model: str, rollouts: list[Rollout], make_config: Any, tmp_path: Path
) -> None:
    critic = CriticLearner("critic-0", make_config(critic=CRITIC), reward_model, "torch")
    critic.start()
    before = np.concatenate(critic.values(rollouts)[0])
    zeros = [np.zeros(len(row.response_ids), np.float32) for row in rollouts]
    parts = rollouts, zeros, zeros, critic.values(rollouts)[0]
    critic.assemble(0.2, [tuple(np.linspace(-1, 1, len(rollouts)))], *parts)
    critic.learn(0.0, 1.0)
    learnt = np.concatenate(critic.values(rollouts)[0])
    assert np.abs(learnt - before).max() > 1e-3
    committed = tmp_path / "critic"
    committed.mkdir()
    for name, content in critic.state()[0].items():
        (committed / name).write_bytes(content)
    loaded = np.concatenate(values_of(str(committed), rollouts))
    np.testing.assert_allclose(loaded, learnt, rtol=1e-4, atol=1e-5)
