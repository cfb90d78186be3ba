"""How much engine and learner may differ: by data types, quantisation, and where they compute."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_ray.config.load import load
from rlhf_ray.driver.mismatch import NF4_CEILING
from rlhf_ray.errors import ConfigError
from rlhf_ray.stages.ppo import stage
from rlhf_ray.types import Prompt

PROMPTS: Any = [Prompt("0", "", tuple(range(64)))]


def weight_sync(num_gpus: float, *overrides: str) -> Any:
    roles: Any = SimpleNamespace(policy=None, num_gpus=lambda: num_gpus)
    return stage._weight_sync(load(None, list(overrides)), roles, PROMPTS)


@pytest.mark.parametrize(
    ("num_gpus", "overrides", "is_exact"),
    [
        (0.0, [], True),
        (1.0, [], False),
        (0.5, [], False),
        (0.0, ["model.dtype=bfloat16"], False),
        (0.0, ["model.quantization=int8"], False),
    ],
)
def test_only_equal_fp32_weights_on_cpus_are_exact(
    num_gpus: float, overrides: list[str], is_exact: bool
) -> None:
    assert weight_sync(num_gpus, *overrides).engine_is_exact == is_exact


@pytest.mark.parametrize("on_gpu", [False, True])
def test_inline_the_process_itself_is_asked(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "own_device", lambda: torch.device("cuda" if on_gpu else "cpu"))
    sync = weight_sync(0.0, "cluster.mode=inline", "rollout.engine=transformers")
    assert sync.engine_is_exact != on_gpu


def test_truncated_fp32_on_gpus_needs_the_weights_that_correct_it() -> None:
    weight_sync(0.0, "rollout.top_p=0.9")
    weight_sync(1.0, "rollout.top_p=0.9", "ppo.importance_cap=2")
    with pytest.raises(ConfigError, match=r"Set ppo\.importance_cap"):
        weight_sync(1.0, "rollout.top_p=0.9")


def test_an_nf4_base_has_a_bound_of_its_own_unless_the_config_has_one() -> None:
    assert weight_sync(1.0, "model.quantization=nf4").max_gap == NF4_CEILING
    assert weight_sync(1.0, "model.quantization=nf4", "rollout.max_gap=0.2").max_gap == 0.2
    assert weight_sync(1.0, "model.quantization=int8").max_gap is None
