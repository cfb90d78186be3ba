"""Rollouts of given texts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

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
