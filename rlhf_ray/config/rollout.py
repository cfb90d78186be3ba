"""Rollouts: the generators, and how responses are sampled."""

from typing import Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.model import Dtype
from rlhf_ray.config.section import (
    MOST_PROCESSES,
    PassThrough,
    Section,
    changeable,
    fixed,
    is_mapping,
    refuse_owned,
    refuse_secrets,
)


class GeneratorsConfig(Section):
    """The rollout engines."""

    num: int = changeable(1, unit="generators", ge=1, le=MOST_PROCESSES, description="Generators.")
    min_ready: int = changeable(
        1,
        unit="generators",
        ge=1,
        description="Generators with which a run begins; those that start later join it.",
    )
    tensor_parallel_size: int = changeable(
        1, unit="GPUs", ge=1, description="GPUs of one generator, all on one node (vLLM only)."
    )
    max_in_flight: int = changeable(
        8, unit="shards", ge=1, description="Most shards in flight at one generator."
    )
    max_restarts: int = changeable(
        10,
        unit="restarts",
        ge=0,
        description="Restarts of failed generators in all; after that the stage continues without "
        "those that fail. The loss of a node counts once.",
    )
    drain_timeout_s: float = changeable(
        60.0,
        unit="seconds",
        ge=0,
        description="How long a generator that leaves may finish its work before others take it "
        "over.",
    )
    straggler_factor: float | None = changeable(
        2.0,
        unit="times",
        gt=1,
        description="A shard that takes so many times as long as the longest one of the other "
        "generators is sampled by one with nothing to do as well, and the first answer counts. "
        "none: never.",
    )

    @model_validator(mode="after")
    def _can_begin(self) -> "GeneratorsConfig":
        if self.min_ready > self.num:
            raise ValueError(
                f"generators.min_ready {self.min_ready} exceeds generators.num {self.num}; lower "
                "the first or raise the second"
            )
        return self


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
"""Sampling settings of other systems that learners do not correct log-probs for."""
UNCORRECTED_ARGS = {"logits_processors", "override_generation_config", "watermark_config"}
"""Such settings of a whole vLLM engine."""
_BIASES = (
    "is not supported: tokens would come from another distribution than the log-probs, and ratios "
    "and KL would be wrong; leave it out. Supported: rollout.temperature, rollout.top_k, "
    "rollout.top_p, rollout.min_tokens"
)


class LengthSamplerConfig(Section):
    """A length limit for each response, drawn from [min, max) with the response's seed."""

    min: int = fixed(..., unit="tokens", ge=1, description="Smallest limit.")
    max: int = fixed(..., unit="tokens", description="End of the range, exclusive.")

    @model_validator(mode="after")
    def _holds_a_number(self) -> "LengthSamplerConfig":
        if self.min >= self.max:
            raise ValueError(
                f"rollout.length_sampler.min {self.min} must be less than its max {self.max}, "
                "which is exclusive"
            )
        return self


class AutoscaleConfig(Section):
    """Adds generators while learners wait for them, and removes some while generators wait."""

    minimum: int = changeable(1, unit="generators", ge=1, description="Fewest generators.")
    maximum: int = changeable(8, unit="generators", ge=1, description="Most generators.")
    iterations: int = changeable(
        5,
        unit="iterations",
        ge=1,
        description="Iterations with the same number of generators before it changes again.",
    )

    @model_validator(mode="after")
    def _leaves_room(self) -> "AutoscaleConfig":
        if self.minimum > self.maximum:
            raise ValueError(
                f"rollout.autoscale.minimum {self.minimum} exceeds rollout.autoscale.maximum "
                f"{self.maximum}; lower the minimum or raise the maximum"
            )
        return self

    def require_within(self, num: int) -> None:
        """Raise a ValueError unless ``generators.num`` is within the bounds."""
        if not self.minimum <= num <= self.maximum:
            raise ValueError(
                f"generators.num {num} is not between rollout.autoscale.minimum {self.minimum} "
                f"and rollout.autoscale.maximum {self.maximum}; change one of them"
            )


class RolloutConfig(Section):
    """Sampling of responses."""

    engine: Literal["vllm", "transformers"] = changeable("vllm", description="Generation engine.")
    serving: Literal["auto", "adapter", "merged"] = changeable(
        "auto",
        description="adapter: the engine's LoRA path; merged: merged into the engine's copy of "
        "the base; auto: merged if the engine's weights are float32, else adapter.",
    )
    dtype: Dtype | None = changeable(
        None, description="Data type of the engine; none: model.dtype."
    )
    shard_size: int = changeable(
        16,
        unit="rollouts",
        ge=1,
        description="Rollouts of a shard, which is generated and scored as one piece.",
    )
    max_tokens: int = fixed(64, unit="tokens", ge=1, description="Longest response.")
    max_prompt_tokens: int = fixed(128, unit="tokens", ge=1, description="Longest prompt.")
    temperature: float = fixed(
        1.0,
        unit="–",
        gt=0,
        description="Sampling temperature; learner and reference scale log-probs alike.",
    )
    top_k: int = fixed(
        0,
        unit="candidates",
        ge=0,
        description="Sample from this many of the likeliest tokens; 0: all. Learner and reference "
        "renormalise log-probs alike.",
    )
    top_p: float = fixed(
        1.0,
        unit="probability",
        gt=0,
        le=1,
        description="Sample from the likeliest tokens that add up to this probability; 1: all.",
    )
    min_tokens: int = fixed(
        0,
        unit="tokens",
        ge=0,
        description="Tokens before which no stop token is sampled and no stop string counts. "
        "Learner and reference renormalise log-probs alike.",
    )
    length_sampler: LengthSamplerConfig | None = fixed(
        None,
        description="Draws a length limit for each response, which may still end earlier; none: "
        "max_tokens for all.",
    )
    ignore_eos: bool = fixed(
        False,
        description="Stop tokens don't end a response: they are sampled like any other, and "
        "generation continues to the limit or a stop string.",
    )
    stop: list[str] = fixed(
        [],
        description="Strings that end a response. The token that completes one is its last, so "
        "the string is scored and learnt.",
    )
    kv_cache_gb: float = changeable(
        0.25, unit="GiB", gt=0, description="KV cache of a vLLM engine on a CPU."
    )
    max_gap: float | None = changeable(
        None,
        unit="nats",
        gt=0,
        description="Largest log-prob mismatch between engine and learner, mean |difference| per "
        "token, at start-up and in every shard; none: by data types, quantisation and devices, "
        "calibrated on the first iteration.",
    )
    batch_invariant: bool = changeable(
        False,
        description="Have vLLM on GPUs compute a response in the same way in any batch "
        "(VLLM_BATCH_INVARIANT): samples don't depend on which generator works on them, or when; "
        "slower. On CPUs it is so anyway.",
    )
    autoscale: AutoscaleConfig | None = changeable(
        None,
        description="Changes the number of generators while PPO runs; none: generators.num, "
        "unless the command scale changes it.",
    )
    engine_args: PassThrough = changeable({}, description="More arguments of vLLM's engine.")

    @field_validator("top_k")
    @classmethod
    def _leaves_a_choice(cls, top_k: int) -> int:
        if top_k == 1:
            raise ValueError(
                "1 always samples the likeliest token, so all samples are equal and nothing can "
                "be learnt; use 0 (all tokens) or at least 2"
            )
        return top_k

    @field_validator("stop")
    @classmethod
    def _spells_something(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError(
                "contains an empty string, which would end every response at once; leave it out"
            )
        return stop

    @model_validator(mode="before")
    @classmethod
    def _nothing_uncorrected(cls, values: object) -> object:
        if is_mapping(values):
            for key in sorted(UNCORRECTED & values.keys()):
                raise ValueError(f"rollout.{key} {values[key]!r} {_BIASES}")
        return values

    @model_validator(mode="after")
    def _lengths(self) -> "RolloutConfig":
        sampler = self.length_sampler
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"rollout.min_tokens {self.min_tokens} exceeds rollout.max_tokens "
                f"{self.max_tokens}; lower the first or raise the second"
            )
        if sampler is not None and sampler.max > self.max_tokens:
            raise ValueError(
                f"rollout.length_sampler.max {sampler.max} exceeds rollout.max_tokens "
                f"{self.max_tokens}; lower the first or raise the second"
            )
        if sampler is not None and self.min_tokens > sampler.min:
            raise ValueError(
                f"rollout.min_tokens {self.min_tokens} exceeds rollout.length_sampler.min "
                f"{sampler.min}, so a response could reach its limit before it may end; lower the "
                "first or raise the second"
            )
        if self.ignore_eos and self.min_tokens:
            raise ValueError(
                f"rollout.min_tokens {self.min_tokens} prevents early stop tokens, but with "
                "rollout.ignore_eos they have no effect; set only one of them"
            )
        return self

    @field_validator("engine_args")
    @classmethod
    def _own_keys(cls, given: PassThrough) -> PassThrough:
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
            "generation_config": "the sampling keys of rollout",
            "trust_remote_code": "model.trust_remote_code",
        }
        refuse_owned("rollout.engine_args", given, owned)
        for key in sorted(UNCORRECTED_ARGS & given.keys()):
            raise ValueError(f"rollout.engine_args.{key} {given[key]!r} {_BIASES}")
        return refuse_secrets("rollout.engine_args", given, "export HF_TOKEN instead")
