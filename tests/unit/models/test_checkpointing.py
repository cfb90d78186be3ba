from pathlib import Path

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import adapters, loading
from rlhf_ray.models.checkpointing import recompute_activations

IDS_BS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])


def wrapped(base: Path) -> torch.nn.Module:
    model = loading.load_causal_lm(str(base), ModelConfig())
    return adapters.attach(model, LoraConfig(r=2), "CAUSAL_LM", seed=0, dropout=0.5).eval()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model(IDS_BS, labels=IDS_BS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_activations_are_computed_twice_and_gradients_are_the_same(base: Path) -> None:
    plain = gradients(wrapped(base))
    model = recompute_activations(wrapped(base))
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    for block in blocks:
        block.self_attn.q_proj.register_forward_hook(count)
    found = gradients(model)
    assert len(blocks) == 2
    assert calls == 4  # forward, and again in the backward pass
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name])


def test_dropout_stays_off(base: Path) -> None:
    model = recompute_activations(wrapped(base))
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.Dropout))
    assert torch.equal(model(IDS_BS).logits, model(IDS_BS).logits)


def test_blocks_with_dropout_of_their_own_are_refused(base: Path) -> None:
    model = wrapped(base)
    next(m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)).dropout = 0.1
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM cannot recompute activations"):
        recompute_activations(model)
