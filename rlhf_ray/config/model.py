"""The base model, and the adapters that are trained on it."""

from typing import Any, Literal

from pydantic import Field, field_validator

from rlhf_ray.config.section import Section, changeable, refuse_owned

Dtype = Literal["float32", "bfloat16", "float16"]


class TinyModelConfig(Section):
    """Shape of the small Llama that is built where no model.path is given."""

    vocab_size: int = Field(
        default=512, ge=300, description="Entries of the byte-level BPE tokenizer."
    )
    hidden_size: int = Field(default=128, gt=0, description="Width.")
    intermediate_size: int = Field(default=352, gt=0, description="Width of the MLP.")
    num_layers: int = Field(default=2, gt=0, description="Transformer blocks.")
    num_heads: int = Field(default=4, gt=0, description="Attention heads; must divide hidden_size.")

    @field_validator("num_heads")
    @classmethod
    def _heads_divide(cls, heads: int, info: Any) -> int:
        width = info.data.get("hidden_size")
        if width and (width % heads or (width // heads) % 2):
            raise ValueError(
                f"{heads} heads do not cut hidden_size {width} into even parts (rotary embedding)"
            )
        return heads


class ModelConfig(Section):
    """The base that every stage starts from."""

    path: str | None = Field(
        default=None, description="Folder or hub name of a causal LM; none: a tiny Llama is built."
    )
    tiny: TinyModelConfig = Field(default=TinyModelConfig(), description="Shape of the tiny Llama.")
    dtype: Dtype = Field(default="float32", description="Data type of the frozen weights.")
    quantization: Literal["none", "int8", "nf4"] = Field(
        default="none",
        description="bitsandbytes quantisation of frozen bases in SFT and PPO learners.",
    )
    attn_implementation: str = changeable(
        "auto", description="As in transformers; auto: its default."
    )
    max_length: int = Field(
        default=256,
        gt=0,
        description="Longest sequence (prompt and response) of any stage, tokens.",
    )
    kwargs: dict[str, Any] = Field(default={}, description="Further arguments of from_pretrained.")
    trust_remote_code: bool = Field(
        default=False, description="Run code that comes with the model folder."
    )

    @field_validator("kwargs")
    @classmethod
    def _own_keys(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        owned = {
            "dtype": "model.dtype",
            "torch_dtype": "model.dtype",
            "quantization_config": "model.quantization",
            "attn_implementation": "model.attn_implementation",
            "trust_remote_code": "model.trust_remote_code",
        }
        return refuse_owned("model.kwargs", kwargs, owned)


class LoraConfig(Section):
    """Shape of a LoRA adapter."""

    r: int = Field(default=16, ge=1, le=512, description="Rank.")
    alpha: float = Field(
        default=32.0, gt=0, description="Scale: the update is multiplied by alpha / r."
    )
    dropout: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description="Dropout on the adapter's input in supervised stages (PPO: off).",
    )
    target_modules: str | list[str] = Field(
        default="all-linear", description="all-linear, or module names such as [q_proj, v_proj]."
    )
    peft: dict[str, Any] = Field(default={}, description="Further arguments of peft.LoraConfig.")

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
    def _own_keys(cls, peft: dict[str, Any]) -> dict[str, Any]:
        owned = {
            "r": "lora.r",
            "lora_alpha": "lora.alpha",
            "lora_dropout": "lora.dropout",
            "target_modules": "lora.target_modules",
            "task_type": "the stage",
        }
        unservable = dict.fromkeys(
            ("use_dora", "lora_bias", "bias", "modules_to_save"),
            "nothing: the generators' engine cannot serve it",
        )
        return refuse_owned("lora.peft", peft, owned | unservable)
