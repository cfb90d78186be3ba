"""Tiny models that tests share: small enough to train in a second."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rlhf_ray.config.model import LoraConfig, ModelConfig, TinyModelConfig
from rlhf_ray.models import adapters, loading, tiny


def build_tiny(folder: Path, texts: Sequence[str], *, sharp: bool = False) -> str:
    """Write a one-layer Llama with a tokenizer of ``texts``; returns its folder.

    Args:
        folder: where to.
        texts: what the tokenizer is trained on.
        sharp: whether the output layer tells tokens apart, so that samples matter.
    """
    shape = TinyModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_heads=2, num_layers=1
    )
    tiny.build(folder, texts, shape, max_length=64, seed=0)
    if sharp:
        model = loading.load_causal_lm(str(folder), ModelConfig())
        with torch.no_grad():
            model.lm_head.weight.mul_(10)
        loading.save_model(model, loading.load_tokenizer(str(folder)), folder)
    return str(folder)


def build_servable(folder: Path, texts: Sequence[str]) -> str:
    """Write a small Llama that vLLM serves; returns its folder.

    Its logits are not flat, so that temperature and samples matter.
    """
    shape = TinyModelConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2)
    tiny.build(folder, texts, shape, max_length=512, seed=0)
    model = loading.load_causal_lm(str(folder), ModelConfig())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                deviation = 0.25 if name.startswith("lm_head") else 0.1
                weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
    loading.save_model(model, loading.load_tokenizer(str(folder)), folder)
    return str(folder)


def write_prompts(path: Path, texts: Sequence[str]) -> Path:
    """Write a JSON Lines file with the question of each text as a prompt."""
    rows = [json.dumps({"prompt": text.partition(" Answer")[0]}) for text in texts]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def with_random_adapter(
    base: str, config: ModelConfig, *, r: int, deviation: float
) -> PreTrainedModel:
    """A model with an adapter of which B, zero when it is new, is random."""
    model = adapters.attach(
        loading.load_causal_lm(base, config), LoraConfig(r=r), "CAUSAL_LM", seed=0, dropout=0.0
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)
    return model
