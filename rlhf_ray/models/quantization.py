"""Frozen bases in 8 or 4 bits, through bitsandbytes."""

from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig

from rlhf_ray.config.model import ModelConfig

_HEADS = ["lm_head", "score", "classifier"]
"""Modules that stay as they are: output layers, which are trained or read to the last digit."""


def quantization_config(settings: ModelConfig) -> BitsAndBytesConfig:
    """bitsandbytes' settings for int8 or nf4 (double quantisation)."""
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_HEADS)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, settings.compute_dtype or settings.dtype),
        llm_int8_skip_modules=_HEADS,
    )


def keep_differentiable(model: Any) -> None:
    """Keep bitsandbytes from repacking nf4 weights in an evaluation forward.

    On CPUs with AVX512-BF16 it does so for speed, and what is trained afterwards gets wrong
    gradients without an error: the kernel for the repacked weights has no backward.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def ready_for_adapter(model: Any, settings: ModelConfig) -> Any:
    """The base as a supervised stage puts an adapter on it.

    What a quantised base keeps in half precision (norms, embeddings) is computed in fp32; a base
    that is not quantised stays as it is.
    """
    if settings.quantization == "none":
        return model
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
