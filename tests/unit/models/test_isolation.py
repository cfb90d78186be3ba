"""Texts of a block are computed as if each stood alone, or the block is refused."""

import pytest
import torch
from tiny_models import random_model

from rlhf_ray.config.model import LoraConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.adapters import attach
from rlhf_ray.models.isolation import isolate_texts

BY_POSITIONS = ("llama", "qwen2", "gemma2", "phi", "gpt_neox", "gpt2", "mistral", "mixtral", "gptj")
BY_MASK = ("opt", "falcon", "mpt", "gpt_oss")
LEAKING = ("bloom", "mamba", "lfm2")
BLOCK = 24


@torch.no_grad()
def difference(model: torch.nn.Module) -> float:
    """The largest difference between logits of two texts in a block and of each alone."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 97, (1, size), generator=generator) for size in (9, 15)]
    positions = [torch.arange(text.shape[1])[None] for text in texts]
    packed = model(
        input_ids=torch.cat(texts, 1), position_ids=torch.cat(positions, 1), use_cache=False
    ).logits
    alone = [model(input_ids=text, use_cache=False).logits for text in texts]
    return float((packed - torch.cat(alone, 1)).abs().max())


@pytest.mark.parametrize("kind", BY_POSITIONS + BY_MASK)
def test_a_text_in_a_block_has_the_logits_that_it_has_alone(kind: str) -> None:
    model = random_model(kind)
    assert (difference(model) > 1) == (kind in BY_MASK)
    isolate_texts(model, BLOCK, "sft.packing")
    assert difference(model) < 1e-4
    isolate_texts(model, 8, "sft.packing")  # the shortest block, too


@pytest.mark.parametrize("kind", BY_MASK)
def test_a_model_under_an_adapter_gets_its_mask_too(kind: str) -> None:
    targets = ["q_proj"] if kind in ("opt", "gpt_oss") else "all-linear"
    lora = LoraConfig(r=2, target_modules=targets)
    model = attach(random_model(kind), lora, "CAUSAL_LM", seed=0, dropout=0.0).eval()
    isolate_texts(model, BLOCK, "sft.packing")
    assert difference(model) < 1e-4


@pytest.mark.parametrize("kind", BY_POSITIONS + BY_MASK)
def test_half_precision_is_not_taken_for_a_leak(kind: str) -> None:
    isolate_texts(random_model(kind).bfloat16(), BLOCK, "sft.packing")


@pytest.mark.parametrize("kind", LEAKING)
def test_a_model_that_cannot_keep_texts_apart_is_refused(kind: str) -> None:
    model = random_model(kind)
    assert difference(model) > 1
    with pytest.raises(ConfigError, match=r"sft\.packing isolate: .* Set sft\.packing=none"):
        isolate_texts(model, BLOCK, "sft.packing")
