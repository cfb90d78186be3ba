"""The base model, and the adapters trained on it."""

from typing import Literal

from pydantic import ValidationInfo, field_validator, model_validator

from rlhf_ray.config.section import (
    PassThrough,
    Section,
    adjustable,
    changeable,
    fixed,
    refuse_owned,
    refuse_secrets,
)

Dtype = Literal["float32", "bfloat16", "float16"]

_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of RoPE scaling that both transformers and vLLM support -> keys that each needs."""

_PEFT_KEYS = (
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "use_rslora",
)
"""Arguments of peft.LoraConfig that keep the base and the form ``W + scale * B @ A``."""

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that don't change the base."""


class TinyModelConfig(Section):
    """Shape of the small Llama that is built if model.path is not set."""

    vocab_size: int = fixed(
        512, unit="entries", ge=300, description="Entries of the byte-level BPE tokenizer."
    )
    hidden_size: int = fixed(128, unit="features", gt=0, description="Width.")
    intermediate_size: int = fixed(352, unit="features", gt=0, description="Width of the MLP.")
    num_layers: int = fixed(2, unit="layers", gt=0, description="Transformer blocks.")
    num_heads: int = fixed(
        4, unit="heads", gt=0, description="Attention heads; must divide hidden_size."
    )

    @field_validator("num_heads")
    @classmethod
    def _heads_divide(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("hidden_size")
        if width and (width % heads or (width // heads) % 2):
            raise ValueError(
                f"{heads} does not divide hidden_size {width} into heads of even size, which "
                "rotary embedding needs"
            )
        return heads


class ShapeConfig(Section):
    """Shape of a decoder, for the command plan if the model's folder is not here."""

    num_layers: int = fixed(..., unit="layers", gt=0, description="Transformer blocks.")
    hidden_size: int = fixed(..., unit="features", gt=0, description="Width.")
    num_heads: int = fixed(..., unit="heads", gt=0, description="Attention heads.")
    num_kv_heads: int | None = fixed(
        None, unit="heads", gt=0, description="Key and value heads; none: num_heads."
    )
    head_dim: int | None = fixed(
        None, unit="features", gt=0, description="Width of a head; none: hidden_size / num_heads."
    )
    intermediate_size: int = fixed(..., unit="features", gt=0, description="Width of the MLP.")
    gated_mlp: bool = fixed(
        True, description="Whether the MLP has a gate (Llama has one, OPT does not)."
    )
    vocab_size: int = fixed(..., unit="entries", gt=0, description="Entries of the vocabulary.")
    tied_embeddings: bool = fixed(False, description="Whether the output layer is the embedding.")


class ModelConfig(Section):
    """The base model that every stage starts from."""

    path: str | None = fixed(
        None, description="Folder or hub name of a causal LM; none: build a tiny Llama."
    )
    tiny: TinyModelConfig = fixed(TinyModelConfig(), description="Shape of the tiny Llama.")
    shape: ShapeConfig | None = changeable(
        None,
        description="Shape of a model whose folder is not here; used only by the command plan.",
    )
    dtype: Dtype = fixed("float32", description="Data type of the frozen weights.")
    quantization: Literal["none", "int8", "nf4"] = fixed(
        "none",
        description="bitsandbytes quantisation of the frozen bases under adapters (nf4: with "
        "double quantisation); the generators' engine serves model.dtype.",
    )
    compute_dtype: Dtype | None = fixed(
        None, description="Data type for computing with nf4 weights; none: model.dtype."
    )
    attn_implementation: str = changeable(
        "auto",
        description="sdpa, eager, flash_attention_2, ...; auto: the best that transformers has "
        "for the architecture (eager if attention scores are capped, as in Gemma 2).",
    )
    rope_scaling: PassThrough | None = fixed(
        None,
        description="RoPE scaling for longer sequences, in place of the base's, such as "
        "{rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}.",
    )
    max_length: int = adjustable(
        256, unit="tokens", gt=0, description="Longest sequence (prompt and response) of any stage."
    )
    kwargs: PassThrough = fixed({}, description="More arguments of from_pretrained.")
    trust_remote_code: bool = fixed(False, description="Run code from the model's folder.")

    @field_validator("kwargs")
    @classmethod
    def _own_keys(cls, kwargs: PassThrough) -> PassThrough:
        owned = {
            "dtype": "model.dtype",
            "torch_dtype": "model.dtype",
            "quantization_config": "model.quantization",
            "attn_implementation": "model.attn_implementation",
            "trust_remote_code": "model.trust_remote_code",
            "use_safetensors": "us: pickles are never read",
            "rope_scaling": "model.rope_scaling",
            "rope_parameters": "model.rope_scaling",
        }
        refuse_owned("model.kwargs", kwargs, owned)
        return refuse_secrets("model.kwargs", kwargs, "export HF_TOKEN instead")

    @field_validator("rope_scaling")
    @classmethod
    def _known_rope(cls, rope: PassThrough | None) -> PassThrough | None:
        if rope is None:
            return None
        kind = rope.get("rope_type")
        if kind not in _ROPE_NEEDS:
            raise ValueError(f"needs rope_type, one of {', '.join(_ROPE_NEEDS)}; got {kind!r}")
        missing = [key for key in _ROPE_NEEDS[kind] if key not in rope]
        if missing:
            raise ValueError(f"lacks {', '.join(missing)}, which rope_type {kind} needs")
        return rope

    @model_validator(mode="after")
    def _compute_dtype_is_nf4s(self) -> "ModelConfig":
        if self.compute_dtype is not None and self.quantization != "nf4":
            raise ValueError(
                f"model.compute_dtype {self.compute_dtype} needs model.quantization nf4, got "
                f"{self.quantization}; leave it out (bitsandbytes sets the type for int8, and an "
                "unquantised base computes in model.dtype)"
            )
        return self


class LoraConfig(Section):
    """Shape of a LoRA adapter."""

    r: int = fixed(16, unit="dimensions", ge=1, le=512, description="Rank.")
    alpha: float = fixed(
        32.0, unit="–", gt=0, description="Scale: the adapter's output is multiplied by alpha / r."
    )
    dropout: float = fixed(
        0.05,
        unit="probability",
        ge=0,
        lt=1,
        description="Dropout on the adapter's input in supervised stages; PPO uses none.",
    )
    target_modules: str | list[str] = fixed(
        "all-linear", description="all-linear, or a list of module names, such as [q_proj, v_proj]."
    )
    peft: PassThrough = fixed({}, description="More arguments of peft.LoraConfig.")

    @field_validator("target_modules")
    @classmethod
    def _modules(cls, modules: str | list[str]) -> str | list[str]:
        if isinstance(modules, str) and modules != "all-linear":
            raise ValueError(f"must be all-linear or a list of module names, got {modules!r}")
        if not modules:
            raise ValueError(
                "is an empty list, so nothing would be trained; name modules, or use all-linear"
            )
        return modules

    @field_validator("peft")
    @classmethod
    def _plain_lora(cls, peft: PassThrough) -> PassThrough:
        owned = {
            "r": "lora.r",
            "lora_alpha": "lora.alpha",
            "lora_dropout": "lora.dropout",
            "target_modules": "lora.target_modules",
            "task_type": "the stage",
        }
        refuse_owned("lora.peft", peft, owned)
        if unsupported := sorted(peft.keys() - set(_PEFT_KEYS)):
            raise ValueError(
                f"lora.peft may not contain {', '.join(map(repr, unsupported))}: neither merging "
                "nor the generators' engine supports it; supported: " + ", ".join(_PEFT_KEYS)
            )
        start = peft.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            raise ValueError(
                f"lora.peft.init_lora_weights {start!r} changes the base, but generators and "
                "merging use the original; set true, gaussian or orthogonal"
            )
        return peft
