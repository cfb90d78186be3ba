"""Fixtures: learners on a tiny model in this process, and rollouts for them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tiny_models import build_tiny

from actors.critic_learner import CriticLearner
from actors.learner import Learner
from actors.policy_learner import PolicyLearner
from rlhf_ray.config import Config, resolve
from rlhf_ray.config.model import TinyModelConfig
from rlhf_ray.models import tiny
from rlhf_ray.types import Prompt, Rollout

TEXTS = [f"Question: how do I sort list {i}?\n\nAnswer: call sorted(x{i})." for i in range(50)]
BATCH = 8


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama with its tokenizer; its logits differ clearly."""
    return build_tiny(tmp_path_factory.mktemp("models") / "base", TEXTS, sharp=True)


@pytest.fixture(scope="session")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny Llama whose rows are whole blocks of nf4, 64 weights."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    shape = TinyModelConfig(
        vocab_size=300, hidden_size=64, intermediate_size=64, num_heads=2, num_layers=1
    )
    tiny.build(folder, TEXTS, shape, max_length=64, seed=0)
    return str(folder)


def config_of(**sections: dict[str, Any]) -> Config:
    """Return a config: two mini-batches of four rollouts, one epoch, no gradient clipping."""
    values: dict[str, Any] = {
        "cluster": {"mode": "inline"},
        "model": {"max_length": 64},
        "lora": {"r": 4},
        "rollout": {"engine": "transformers", "max_prompt_tokens": 32, "max_tokens": 16},
        "ppo": {
            "batch_size": BATCH,
            "mini_batch_size": 4,
            "epochs": 1,
            "learning_rate": 1e-2,
            "max_grad_norm": 1e9,
        },
        "critic": {"learning_rate": 1e-2, "lora": {"r": 4}},
    }
    for name, keys in sections.items():
        values[name] = values.get(name, {}) | keys
    return resolve(values)


@pytest.fixture
def make_config() -> Callable[..., Config]:
    """A function that makes a config; its sections override defaults key by key."""
    return config_of


@pytest.fixture
def make_learner(base: str) -> Callable[..., Any]:
    """A function that makes a started learner on the torch engine."""

    def make(kind: type[Learner], **sections: dict[str, Any]) -> Any:
        learner = kind("learner-0", config_of(**sections), base, "torch")
        learner.start()
        return learner

    return make


@pytest.fixture
def policy(make_learner: Callable[..., Any]) -> PolicyLearner:
    """A policy learner."""
    return make_learner(PolicyLearner)


@pytest.fixture
def critic(make_learner: Callable[..., Any]) -> CriticLearner:
    """A critic learner."""
    return make_learner(CriticLearner)


@pytest.fixture(scope="session")
def rollouts() -> list[Rollout]:
    """Eight rollouts of unequal lengths in order of position."""
    rng = np.random.default_rng(0)
    rows = []
    for position in range(BATCH):
        num_prompt, num_response = int(rng.integers(2, 20)), int(rng.integers(1, 16))
        rows.append(
            Rollout(
                position=position,
                prompt=Prompt(str(position), "", tuple(rng.integers(3, 290, num_prompt).tolist())),
                response_ids=rng.integers(3, 290, num_response).astype(np.int64),
                rollout_logprobs=np.full(num_response, -5.0, np.float32),
                finish_reason="stop",
                version=0,
                text="",
            )
        )
    return rows
