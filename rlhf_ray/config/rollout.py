"""Rollouts: who generates, and how responses are sampled."""

from typing import Any, Literal

from pydantic import Field, field_validator

from rlhf_ray.config.credentials import refuse_secrets
from rlhf_ray.config.model import Dtype
from rlhf_ray.config.section import Section, changeable, refuse_owned


class GeneratorsConfig(Section):
    """The rollout engines."""

    num: int = changeable(1, ge=1, description="Generators.")
    tensor_parallel_size: int = changeable(
        1, ge=1, description="GPUs of one generator, all of one node (vLLM alone)."
    )
    max_in_flight: int = changeable(8, ge=1, description="Shards at one generator at a time.")


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["vllm", "transformers"] = changeable("vllm", description="Generation engine.")
    serving: Literal["auto", "adapter", "merged"] = changeable(
        "auto",
        description="adapter: the engine's LoRA path; merged: merged into the engine's own copy of "
        "the base; auto: merged where the engine's weights are float32, else adapter.",
    )
    dtype: Dtype | None = changeable(None, description="Engine's data type; none: model.dtype.")
    shard_size: int = changeable(16, ge=1, description="Rollouts handed on as one piece.")
    max_tokens: int = Field(default=64, ge=1, description="Longest response, tokens.")
    max_prompt_tokens: int = Field(default=128, ge=1, description="Longest prompt, tokens.")
    temperature: float = Field(
        default=1.0, gt=0, description="Sampling temperature, on both sides."
    )
    top_k: int = Field(
        default=0,
        ge=0,
        description="Only so many of the likeliest tokens are drawn; 0: all. Learner and "
        "reference renormalise log-probs alike.",
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Only the likeliest tokens that hold this share of the probability are drawn; "
        "1: all.",
    )
    kv_cache_gb: float = changeable(0.25, gt=0, description="KV cache of a CPU engine, GiB.")
    max_gap: float | None = changeable(
        None,
        gt=0,
        description="Most mean |engine - learner| log-prob, nats a token, in the proof and in "
        "every shard; none: as data types allow, calibrated on the first iteration.",
    )
    engine_args: dict[str, Any] = changeable({}, description="Further vLLM engine arguments.")

    @field_validator("top_k")
    @classmethod
    def _leaves_a_choice(cls, top_k: int) -> int:
        if top_k == 1:
            raise ValueError(
                "1 draws the likeliest token every time: all samples are equal and none is better "
                "than expected; use 0 (all tokens) or 2 and more"
            )
        return top_k

    @field_validator("engine_args")
    @classmethod
    def _own_keys(cls, given: dict[str, Any]) -> dict[str, Any]:
        owned = {
            "model": "model.path",
            "tokenizer": "model.path",
            "dtype": "rollout.dtype",
            "max_model_len": "model.max_length",
            "tensor_parallel_size": "generators.tensor_parallel_size",
            "enable_lora": "rollout.serving",
            "max_loras": "rollout.serving",
            "max_lora_rank": "lora.r",
            "worker_extension_cls": "the weight sync",
            "logprobs_mode": "rollout.temperature, rollout.top_k and rollout.top_p",
            "seed": "run.seed",
            "trust_remote_code": "model.trust_remote_code",
        }
        refuse_owned("rollout.engine_args", given, owned)
        return refuse_secrets("rollout.engine_args", given, "export HF_TOKEN instead")
