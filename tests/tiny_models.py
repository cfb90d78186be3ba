"""Tiny models that tests share: small enough to train in a second."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


_WIDTHS = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_OF_KIND: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
    "gpt2": _GPT2,
    "gptj": _GPT2 | {"rotary_dim": 4},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gpt_oss": {
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
    },
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
"""Kind of model -> how it names its widths, and what else it needs."""


def random_model(kind: str, **more: Any) -> PreTrainedModel:
    """A causal LM of two layers whose weights are so large that every layer matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **_WIDTHS | _OF_KIND.get(kind, {}) | more)
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() >= 2:
                scale = 2 * weight.shape[-1] ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def build_random(kind: str, folder: Path, texts: Sequence[str], **more: Any) -> str:
    """Write a `random_model` with a tokenizer of ``texts``; returns its folder."""
    build_tiny(folder, texts)
    tokenizer = loading.load_tokenizer(str(folder))
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    loading.save_model(random_model(kind, vocab_size=300, **ends, **more), tokenizer, folder)
    return str(folder)
