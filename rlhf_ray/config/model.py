"""The base model, and the adapters that are trained on it."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.section import Section, changeable, fixed, refuse_owned, refuse_secrets

Dtype = Literal["float32", "bfloat16", "float16"]

_ROPE_NEEDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
"""Kinds of RoPE scaling that transformers and vLLM both know, and the keys of each."""

_PEFT_KEYS = (
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "use_rslora",
)
"""Arguments of peft.LoraConfig that change neither the base nor the form ``W + scale * B @ A``."""

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base as it is."""


class TinyModelConfig(Section):
    """Shape of the small Llama that is built where no model.path is given."""

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
    def _heads_divide(cls, heads: int, info: Any) -> int:
        width = info.data.get("hidden_size")
        if width and (width % heads or (width // heads) % 2):
            raise ValueError(
                f"{heads} heads do not cut hidden_size {width} into even parts (rotary embedding)"
            )
        return heads


class ShapeConfig(Section):
    """Shape of a decoder, which the command plan takes where there is no folder."""

    num_layers: int = fixed(..., unit="layers", gt=0, description="Transformer blocks.")
    hidden_size: int = fixed(..., unit="features", gt=0, description="Width.")
    num_heads: int = fixed(..., unit="heads", gt=0, description="Attention heads.")
    num_kv_heads: int | None = fixed(
        None, unit="heads", gt=0, description="Heads of keys and values; none: num_heads."
    )
    head_dim: int | None = fixed(
        None, unit="features", gt=0, description="Width of a head; none: hidden_size / num_heads."
    )
    intermediate_size: int = fixed(..., unit="features", gt=0, description="Width of the MLP.")
    gated_mlp: bool = fixed(
        True, description="Whether the MLP has a gate, as Llama's has and OPT's has not."
    )
    vocab_size: int = fixed(..., unit="entries", gt=0, description="Entries of the vocabulary.")
    tied_embeddings: bool = fixed(False, description="Whether the output layer is the embedding.")


class ModelConfig(Section):
    """The base that every stage starts from."""

    path: str | None = fixed(
        None, description="Folder or hub name of a causal LM; none: a tiny Llama is built."
    )
    tiny: TinyModelConfig = fixed(TinyModelConfig(), description="Shape of the tiny Llama.")
    shape: ShapeConfig | None = changeable(
        None, description="Shape of a model that is no folder here, for the command plan alone."
    )
    dtype: Dtype = fixed("float32", description="Data type of the frozen weights.")
    quantization: Literal["none", "int8", "nf4"] = fixed(
        "none",
        description="bitsandbytes quantisation of the frozen bases that adapters are trained on "
        "(nf4: double quantisation); the engine serves model.dtype.",
    )
    compute_dtype: Dtype | None = fixed(
        None, description="Data type that nf4 weights are computed in; none: model.dtype."
    )
    attn_implementation: str = changeable(
        "auto",
        description="sdpa, eager, flash_attention_2, ...; auto: the best that transformers finds "
        "for the architecture.",
    )
    rope_scaling: dict[str, Any] | None = fixed(
        None,
        description="Rotary embedding for longer sequences, over the base's own, e.g. "
        "{rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}.",
    )
    max_length: int = fixed(
        256,
        unit="tokens",
        gt=0,
        description="Longest sequence (prompt and response) of any stage, tokens.",
    )
    kwargs: dict[str, Any] = fixed({}, description="Further arguments of from_pretrained.")
    trust_remote_code: bool = fixed(False, description="Run code that comes with the model folder.")

    @field_validator("kwargs")
    @classmethod
    def _own_keys(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
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
    def _known_rope(cls, rope: dict[str, Any] | None) -> dict[str, Any] | None:
        if rope is None:
            return None
        kind = rope.get("rope_type")
        if kind not in _ROPE_NEEDS:
            raise ValueError(f"rope_type must be one of {', '.join(_ROPE_NEEDS)}, got {kind!r}")
        missing = [key for key in _ROPE_NEEDS[kind] if key not in rope]
        if missing:
            raise ValueError(f"rope_type {kind} also needs {', '.join(missing)}")
        return rope

    @model_validator(mode="after")
    def _compute_dtype_is_nf4s(self) -> "ModelConfig":
        if self.compute_dtype is not None and self.quantization != "nf4":
            raise ValueError(
                f"model.compute_dtype {self.compute_dtype} is for model.quantization nf4, got "
                f"{self.quantization}; leave it out (int8 computes as bitsandbytes does, a base "
                "that is not quantised in model.dtype)"
            )
        return self


class LoraConfig(Section):
    """Shape of a LoRA adapter."""

    r: int = fixed(16, unit="dimensions", ge=1, le=512, description="Rank.")
    alpha: float = fixed(
        32.0, unit="–", gt=0, description="Scale: the update is multiplied by alpha / r."
    )
    dropout: float = fixed(
        0.05,
        unit="probability",
        ge=0,
        lt=1,
        description="Dropout on the adapter's input in supervised stages (PPO: off).",
    )
    target_modules: str | list[str] = fixed(
        "all-linear", description="all-linear, or module names such as [q_proj, v_proj]."
    )
    peft: dict[str, Any] = fixed({}, description="Further arguments of peft.LoraConfig.")

    @field_validator("target_modules")
    @classmethod
    def _modules(cls, modules: str | list[str]) -> str | list[str]:
        if isinstance(modules, str) and modules != "all-linear":
            raise ValueError(f"must be all-linear or a list of module names, got {modules!r}")
        if not modules:
            raise ValueError("names no module: nothing would be trained")
        return modules

    @field_validator("peft")
    @classmethod
    def _plain_lora(cls, peft: dict[str, Any]) -> dict[str, Any]:
        owned = {
            "r": "lora.r",
            "lora_alpha": "lora.alpha",
            "lora_dropout": "lora.dropout",
            "target_modules": "lora.target_modules",
            "task_type": "the stage",
        }
        others = dict.fromkeys(
            peft.keys() - owned.keys() - set(_PEFT_KEYS),
            "nothing: merging and the generators' engine cannot serve it; "
            f"they keep {', '.join(_PEFT_KEYS)}",
        )
        refuse_owned("lora.peft", peft, owned | others)
        start = peft.get("init_lora_weights", True)
        if start not in _PLAIN_STARTS:
            raise ValueError(
                f"lora.peft.init_lora_weights {start!r} changes the base, which the generators and "
                "the merge take as it is; use true, gaussian or orthogonal"
            )
        return peft
