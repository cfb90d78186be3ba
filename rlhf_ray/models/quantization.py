"""How a frozen base is stored in 8 or 4 bits, by bitsandbytes."""

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from rlhf_ray.config.model import ModelConfig

_REPACKS = "support_avx512bf16_for_cpu"
"""Attribute by which a 4-bit layer of bitsandbytes repacks its weights."""
_UNQUANTIZED = ["lm_head", "score", "classifier"]
"""Output layers stay in full precision: they are trained, or their small differences matter."""


def quantization_config(settings: ModelConfig) -> BitsAndBytesConfig:
    """Return how bitsandbytes stores the weights of a frozen base."""
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_UNQUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.compute_dtype or settings.dtype),
        llm_int8_skip_modules=_UNQUANTIZED,
    )


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking nf4 weights in an evaluation forward.

    On CPUs with AVX512-BF16 it repacks for speed. The kernel for repacked weights has no backward,
    so later training gets wrong gradients without an error.
    """
    for module in model.modules():
        if hasattr(module, _REPACKS):
            setattr(module, _REPACKS, False)
