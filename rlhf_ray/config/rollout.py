"""Rollouts: who generates, and how responses are sampled."""

from typing import Any, Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.model import Dtype
from rlhf_ray.config.section import Section, changeable, fixed, refuse_owned, refuse_secrets


class GeneratorsConfig(Section):
    """The rollout engines."""

    num: int = changeable(1, unit="generators", ge=1, description="Generators.")
    tensor_parallel_size: int = changeable(
        1, unit="GPUs", ge=1, description="GPUs of one generator, all of one node (vLLM alone)."
    )
    max_in_flight: int = changeable(
        8, unit="shards", ge=1, description="Shards at one generator at a time."
    )
    max_restarts: int = changeable(
        10,
        unit="restarts",
        ge=0,
        description="Generators that are started anew after they failed, all together, before the "
        "stage does without them.",
    )
    drain_timeout_s: float = changeable(
        60.0,
        unit="seconds",
        ge=0,
        description="How long a generator that leaves may go on with what it has begun before "
        "others do it, seconds.",
    )


UNCORRECTED = {
    "allowed_token_ids",
    "bad_words",
    "bad_words_ids",
    "epsilon_cutoff",
    "eta_cutoff",
    "frequency_penalty",
    "logit_bias",
    "logits_processors",
    "min_p",
    "no_repeat_ngram_size",
    "num_beams",
    "presence_penalty",
    "repetition_penalty",
    "sequence_bias",
    "suppress_tokens",
    "typical_p",
}
"""Settings of other systems that change what is drawn in a way that learners do not repeat."""
UNCORRECTED_ARGS = {"logits_processors", "override_generation_config", "watermark_config"}
"""Those that vLLM has for a whole engine."""
_BIASES = (
    "would draw tokens from another distribution than log-probs are of, so that ratios and KL "
    "would be wrong; leave it out. What is corrected on all sides: rollout.temperature, "
    "rollout.top_k, rollout.top_p, rollout.min_tokens"
)


class LengthSamplerConfig(Section):
    """Each response's own limit, drawn from [min, max) by its seed, whoever generates it."""

    min: int = fixed(..., unit="tokens", ge=1, description="Smallest limit, tokens.")
    max: int = fixed(
        ..., unit="tokens", description="End of the range, tokens, itself never drawn."
    )

    @model_validator(mode="after")
    def _holds_a_number(self) -> "LengthSamplerConfig":
        if self.min >= self.max:
            raise ValueError(
                f"rollout.length_sampler.min {self.min} must be below its max {self.max}, which is "
                "never drawn itself"
            )
        return self


class AutoscaleConfig(Section):
    """Generators by who waits for whom: more where learners do, fewer where generators do."""

    minimum: int = changeable(1, unit="generators", ge=1, description="Fewest generators.")
    maximum: int = changeable(8, unit="generators", ge=1, description="Most generators.")
    iterations: int = changeable(
        5,
        unit="iterations",
        ge=1,
        description="Iterations with as many generators before their number changes.",
    )

    @model_validator(mode="after")
    def _leaves_room(self) -> "AutoscaleConfig":
        if self.minimum > self.maximum:
            raise ValueError(
                f"rollout.autoscale.minimum {self.minimum} exceeds rollout.autoscale.maximum "
                f"{self.maximum}; lower it, or raise that"
            )
        return self


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["vllm", "transformers"] = changeable("vllm", description="Generation engine.")
    serving: Literal["auto", "adapter", "merged"] = changeable(
        "auto",
        description="adapter: the engine's LoRA path; merged: merged into the engine's own copy of "
        "the base; auto: merged where the engine's weights are float32, else adapter.",
    )
    dtype: Dtype | None = changeable(None, description="Engine's data type; none: model.dtype.")
    shard_size: int = changeable(
        16, unit="rollouts", ge=1, description="Rollouts handed on as one piece."
    )
    max_tokens: int = fixed(64, unit="tokens", ge=1, description="Longest response, tokens.")
    max_prompt_tokens: int = fixed(128, unit="tokens", ge=1, description="Longest prompt, tokens.")
    temperature: float = fixed(
        1.0, unit="–", gt=0, description="Sampling temperature, on both sides."
    )
    top_k: int = fixed(
        0,
        unit="candidates",
        ge=0,
        description="Only so many of the likeliest tokens are drawn; 0: all. Learner and "
        "reference renormalise log-probs alike.",
    )
    top_p: float = fixed(
        1.0,
        unit="probability",
        gt=0,
        le=1,
        description="Only the likeliest tokens that hold this share of the probability are drawn; "
        "1: all.",
    )
    min_tokens: int = fixed(
        0,
        unit="tokens",
        ge=0,
        description="No stop token is drawn before so many tokens, and no stop string counts. "
        "Learner and reference renormalise log-probs alike.",
    )
    length_sampler: LengthSamplerConfig | None = fixed(
        None,
        description="Draws a limit for each response; none: all have max_tokens. A response that "
        "ends by itself may be shorter.",
    )
    ignore_eos: bool = fixed(
        False,
        description="Stop tokens end no response: they are drawn as any other, and generation goes "
        "on up to the limit or a stop string.",
    )
    stop: list[str] = fixed(
        [],
        description="Strings that end a response. The token that completes one is its last, so the "
        "string stays in what is scored and learnt.",
    )
    kv_cache_gb: float = changeable(
        0.25, unit="GiB", gt=0, description="KV cache of a CPU engine, GiB."
    )
    max_gap: float | None = changeable(
        None,
        unit="nats",
        gt=0,
        description="Most mean |engine - learner| log-prob, nats a token, in the proof and in "
        "every shard; none: as data types allow, calibrated on the first iteration.",
    )
    autoscale: AutoscaleConfig | None = changeable(
        None,
        description="Changes the number of generators while PPO runs; none: it stays as "
        "generators.num, or the command scale, says.",
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

    @field_validator("stop")
    @classmethod
    def _spells_something(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError(
                "holds an empty string, which every response contains from its first token on; "
                "leave it out"
            )
        return stop

    @model_validator(mode="before")
    @classmethod
    def _nothing_uncorrected(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in sorted(UNCORRECTED & set(values)):
                raise ValueError(f"rollout.{key} {values[key]!r} {_BIASES}")
        return values

    @model_validator(mode="after")
    def _lengths(self) -> "RolloutConfig":
        sampler = self.length_sampler
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"rollout.min_tokens {self.min_tokens} exceeds rollout.max_tokens "
                f"{self.max_tokens}; lower it, or raise that"
            )
        if sampler is not None and sampler.max > self.max_tokens:
            raise ValueError(
                f"rollout.length_sampler.max {sampler.max} exceeds rollout.max_tokens "
                f"{self.max_tokens}; lower it, or raise that"
            )
        if sampler is not None and self.min_tokens > sampler.min:
            raise ValueError(
                f"rollout.min_tokens {self.min_tokens} exceeds rollout.length_sampler.min "
                f"{sampler.min}, so a response could be cut before it may end; lower it, or raise "
                "that"
            )
        if self.ignore_eos and self.min_tokens:
            raise ValueError(
                f"rollout.min_tokens {self.min_tokens} keeps stop tokens from being drawn, and "
                "rollout.ignore_eos lets them be drawn without an effect; set one of them"
            )
        return self

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
            "skip_tokenizer_init": "rollout.stop",
            "generation_config": "rollout, whose keys say how tokens are drawn",
            "trust_remote_code": "model.trust_remote_code",
        }
        refuse_owned("rollout.engine_args", given, owned)
        for key in sorted(UNCORRECTED_ARGS & set(given)):
            raise ValueError(f"rollout.engine_args.{key} {given[key]!r} {_BIASES}")
        return refuse_secrets("rollout.engine_args", given, "export HF_TOKEN instead")
