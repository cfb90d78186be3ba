"""Rollouts of given texts, and a file of reward functions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import user_functions

from rlhf_ray.types import Prompt, Rollout


@pytest.fixture
def rollout() -> Callable[..., Rollout]:
    """Makes a rollout: rollout(response, prompt="Why? ", **columns)."""

    def make(response: str, prompt: str = "Why? ", **columns: Any) -> Rollout:
        return Rollout(
            position=0,
            prompt=Prompt("7", prompt, (1, 2), columns),
            response_ids=np.array([5, 6], np.int64),
            rollout_logprobs=np.zeros(2, np.float32),
            finish_reason="stop",
            version=0,
            text=response,
        )

    return make


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(user_functions.CODE)
    return path


@pytest.fixture
def two(rollout: Callable[..., Rollout]) -> list[Rollout]:
    """Two rollouts; the second's row lacks the first's columns."""
    return [rollout("yes", "a", level=2), rollout("skip it", "bc", level=3)]
