"""What a config asks of `from_pretrained`, and what is put right in a model that it returns."""

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig, PretrainedConfig

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import ConfigError

_REPACKS = "support_avx512bf16_for_cpu"
"""Attribute by which a 4-bit layer of bitsandbytes repacks its weights."""
_UNQUANTIZED = ["lm_head", "score", "classifier"]
"""Output layers stay in full precision: they are trained, or their small differences matter."""


def own_device() -> torch.device:
    """Return where this process computes: its GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def load_arguments(path: str, settings: ModelConfig, *, quantized: bool) -> dict[str, Any]:
    """Return the keyword arguments that settings and the model's own config.json ask for.

    Args:
        path: model folder or hub name.
        settings: the config's.
        quantized: apply ``settings.quantization``.

    Raises:
        ConfigError: the settings do not fit the architecture.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    arguments = {
        "attn_implementation": _attention(config, path, settings),
        "rope_parameters": _rope(config, path, settings),
    }
    if quantized and settings.quantization != "none":
        arguments["quantization_config"] = quantization_config(settings)
        arguments["device_map"] = {"": own_device()}  # it cannot be moved later
    elif getattr(config, "quantization_config", None) and own_device().type == "cuda":
        # The same of a folder that is quantised (GPTQ, compressed-tensors, fp8).
        arguments["device_map"] = {"": own_device()}
    return {name: value for name, value in arguments.items() if value is not None}


def rope_parameters(path: str, settings: ModelConfig) -> dict[str, Any] | None:
    """Return a model's rotary parameters with ``model.rope_scaling`` applied; None: unchanged.

    A finished classifier keeps the parameters that it was trained with: scaling is for the base.

    Args:
        path: model folder or hub name.
        settings: ``rope_scaling`` and ``trust_remote_code``.

    Raises:
        ConfigError: the architecture has no rotary embedding, or one for each kind of layer.
    """
    if settings.rope_scaling is None:
        return None
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    return _rope(config, path, settings)


def _rope(config: PretrainedConfig, path: str, settings: ModelConfig) -> dict[str, Any] | None:
    is_classifier = any("SequenceClassification" in name for name in config.architectures or ())
    if settings.rope_scaling is None or is_classifier:
        return None
    own = getattr(config, "rope_parameters", None)
    if not own or any(isinstance(value, dict) for value in own.values()):
        what = "one for each kind of layer" if own else "no rotary embedding"
        raise ConfigError(
            f"model.rope_scaling: {path} ({config.model_type}) has {what}; leave it out, or change "
            "the model folder's config.json"
        )
    return {**own, **settings.rope_scaling}


def _attention(config: PretrainedConfig, path: str, settings: ModelConfig) -> str | None:
    """Return the attention to compute with; None: transformers' choice.

    That is sdpa, which leaves the soft-capping of Gemma 2's attention scores out, with a log
    message alone.
    """
    chosen = settings.attn_implementation
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap and chosen == "sdpa":
        raise ConfigError(
            f"model.attn_implementation sdpa leaves out the soft-capping of attention scores at "
            f"{cap:g} that {path} was trained with; set auto, eager or flash_attention_2"
        )
    if chosen != "auto":
        return chosen
    return "eager" if cap else None


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


def writable(generation: GenerationConfig) -> GenerationConfig:
    """Return a generation config that transformers also saves, not only loads.

    It refuses to save settings that contradict each other, such as a temperature without sampling.
    Then only the token ids are kept.
    """
    try:
        generation.validate(strict=True)
    except ValueError:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return GenerationConfig(**{name: getattr(generation, name) for name in names})
    return generation
