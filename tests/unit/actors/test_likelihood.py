"""Tests of the answers' loss against hand-computed numbers and the model's own logits."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import with_random_adapter

from actors.likelihood import Likelihood
from rlhf_ray.config import Config
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.engines.served_adapters import tensors_to_bytes
from rlhf_ray.models.adapters import adapter_state, peft_config
from rlhf_ray.models.loading import load_causal_lm, load_tokenizer, save_model
from rlhf_ray.types import Rollout

MakeConfig = Callable[..., Config]


def test_a_model_that_knows_nothing_is_as_perplexed_as_its_vocabulary_is_large(
    base: str, tmp_path: Path, make_config: MakeConfig, rollouts: list[Rollout]
) -> None:
    """A token costs log V nats where logits are equal."""
    model = load_causal_lm(base, ModelConfig())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    save_model(model, load_tokenizer(base), tmp_path)
    likelihood = Likelihood("l", make_config(), str(tmp_path))
    likelihood.start()
    loss, num_tokens = likelihood.loss(rollouts)
    assert num_tokens == sum(len(rollout.response_ids) for rollout in rollouts)
    assert math.exp(loss / num_tokens) == pytest.approx(model.config.vocab_size, rel=1e-5)


def test_each_adapter_is_the_one_that_is_measured(
    base: str, make_config: MakeConfig, rollouts: list[Rollout]
) -> None:
    """The temperature of rollouts must have no effect."""
    likelihood = Likelihood("l", make_config(rollout={"temperature": 0.5}), base)
    likelihood.start()
    for r in (4, 2):
        adapted = with_random_adapter(base, ModelConfig(), r=r, deviation=0.3)
        likelihood.hold(peft_config(adapted), tensors_to_bytes(adapter_state(adapted)))
        expected = 0.0
        for rollout in rollouts:
            ids = torch.tensor(rollout.sequence_ids)[None]
            with torch.no_grad():
                losses = torch.nn.functional.cross_entropy(
                    adapted(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none"
                )
            expected += float(losses[-len(rollout.response_ids) :].sum())
        assert likelihood.loss(rollouts)[0] == pytest.approx(expected, rel=1e-5)
