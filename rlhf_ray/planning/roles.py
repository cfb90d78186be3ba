"""Memory of a worker of each role of PPO, part by part."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhf_ray.config import Config
from rlhf_ray.config.learners import LearnerConfig
from rlhf_ray.config.model import Dtype, LoraConfig
from rlhf_ray.placement.hardware import GpuKind
from rlhf_ray.placement.layout import RUN_MODELS, Demand, demands
from rlhf_ray.planning.memory import (
    ADAM_BYTES,
    BYTES,
    Parts,
    Pass,
    Shape,
    adapter_pass_bytes,
    chunked_logits_bytes,
    deepspeed_parts,
    forward_bytes,
    weights_bytes,
)
from rlhf_ray.planning.shapes import Models

GPU_LIBRARIES = 1.0e9
"""Bytes of a process's CUDA context, its kernels, and the work space of cuBLAS."""
NCCL = 0.5e9
"""Bytes of the buffers of a group's channels."""
CPU_LIBRARIES = 0.37e9
"""Bytes of an idle role's process on a CPU (measured)."""

UTILIZATION_KEY, CACHE_KEY = "gpu_memory_utilization", "kv_cache_memory_bytes"
"""Keys of rollout.engine_args for vLLM's share of a GPU, and for its KV cache alone."""
UTILIZATION = 0.92
"""Share of a GPU that vLLM takes where neither is set."""
BLOCK = 16
"""Tokens of a block of vLLM's KV cache, unless engine_args.block_size is set."""
ENGINE_LIBRARIES = 2.5e9
"""Bytes of vLLM's CUDA context, its CUDA graphs, and buffers of its largest prefill."""
CPU_ENGINE = 1.4e9
"""Bytes of an idle CPU engine's three processes (measured)."""
SAMPLER_ROWS, SAMPLER_BYTES = 256, 16
"""Rows of logits that vLLM reserves memory for in its profiling run; bytes of a logit: four fp32
tensors."""


@dataclass(frozen=True)
class Engine:
    """The memory of one generator's engine."""

    parts: Parts
    """Bytes on each of its GPUs."""
    token_bytes: float
    """Bytes of a token in its KV cache, on each of its GPUs."""
    lacking: float = 0.0
    """Bytes that it needs beyond its share of a GPU before it has any cache."""
    block: int | None = None
    """Tokens of a block of its KV cache; None: any number, as far as is known."""

    def sequences(self, tokens: int) -> int:
        """Return how many sequences of a length its KV cache holds at a time."""
        none, one = (self.cache_bytes(number, tokens) for number in (0, 1))
        return max(0, int((self.parts["KV cache"] - none) // (one - none)))

    def cache_bytes(self, sequences: int, tokens: int) -> float:
        """Return the bytes of a KV cache for so many sequences: whole blocks, and vLLM's own."""
        block = self.block or 1
        blocks = sequences * math.ceil(tokens / block) + (self.block is not None)
        return blocks * block * self.token_bytes


@dataclass(frozen=True)
class PlannedRole:
    """The workers of one role, or of one supervised stage."""

    role: str
    workers: int
    gpus: float
    """GPUs of one worker; 0: it runs on a CPU."""
    parts: Mapping[str, float]
    """Bytes by part at peak, on each of its GPUs; in main memory where it has none."""
    start: float = 0.0
    """Bytes while it loads, before ZeRO-3 has sharded the weights."""

    @property
    def total(self) -> float:
        """Bytes at peak."""
        return sum(self.parts.values())

    @property
    def peak(self) -> float:
        """The most bytes it ever holds: at peak or while it loads."""
        return max(self.total, self.start)


@dataclass(frozen=True)
class Setting:
    """Inputs of the estimates of memory and time."""

    config: Config
    models: Models
    kinds: Mapping[str, GpuKind | None]
    """Role -> kind of its GPUs, None where unknown; a role that runs on CPUs has no entry."""

    def libraries(self, role: str, in_group: bool = False) -> float:
        """Return the bytes of an idle process."""
        return GPU_LIBRARIES + NCCL * in_group if role in self.kinds else CPU_LIBRARIES

    def longest(self) -> int:
        """Return the tokens of the longest rollout."""
        return self.config.rollout.max_prompt_tokens + self.config.rollout.max_tokens

    def micro_batch(self, most_rows: int) -> Pass:
        """Return the largest pass over at most so many rollouts, all of full length."""
        limit, longest = self.config.ppo.max_tokens_per_micro_batch, self.longest()
        rows = min(limit // longest, most_rows)
        return Pass(rows * longest, longest, BYTES[self.config.model.dtype])

    def learnt(self, group: LearnerConfig) -> Pass:
        """Return the largest pass of a learner rank: within its part of a mini-batch."""
        micro = self.micro_batch(self.config.ppo.mini_batch_size // group.num_ranks)
        return replace(micro, recomputes=group.gradient_checkpointing)

    def scored(self) -> Pass:
        """Return the largest pass of a scorer: within a shard."""
        return self.micro_batch(self.config.rollout.shard_size)


def ppo_roles(setting: Setting) -> list[PlannedRole]:
    """Return the roles that the config needs, the driver included."""
    roles = [planned_role(setting, demand) for demand in demands(setting.config)]
    return [*roles, PlannedRole("driver", 1, 0, _driver(setting))]


def planned_role(setting: Setting, demand: Demand) -> PlannedRole:
    """Return the workers of one role."""
    role = demand.role
    gpus = demand.gpus if role in setting.kinds else 0
    if role == "generator":
        return PlannedRole(role, demand.workers, gpus, engine(setting).parts)
    parts = {"policy": _policy, "critic": _critic, "reference": _reference, "reward": _reward}
    held, start = parts[role](setting)
    return PlannedRole(role, demand.workers, gpus, held, start)


def state_bytes(config: Config, models: Models) -> float:
    """Return the bytes of the learners' state in a commit: trained weights and their optimizers."""
    policy = models.tuned.shape.adapter_parameters(config.lora)
    critic = 0
    if config.may_have_critic:
        shape = models.critic.shape
        critic = shape.adapter_parameters(config.critic.lora) + shape.hidden_size
    saved = policy_adapter_bytes(config, models) + critic * BYTES["float32"]
    return (policy + critic) * (4 + ADAM_BYTES) + saved


def policy_adapter_bytes(config: Config, models: Models) -> float:
    """Return the bytes of the policy's adapter alone, in the data type that is served."""
    return models.tuned.shape.adapter_parameters(config.lora) * BYTES[config.model.dtype]


def longest_held(config: Config) -> int:
    """Return the tokens of a sequence for which each engine must have room.

    vLLM refuses to start with less than `model.max_length`; with transformers a cache grows with
    the rollouts that are sampled, and is planned for them.
    """
    if config.rollout.engine == "vllm":
        return config.model.max_length
    return config.rollout.max_prompt_tokens + config.rollout.max_tokens


def engine(setting: Setting) -> Engine:
    """Return the memory of a generator's engine."""
    kind = setting.kinds.get("generator")
    return engine_of(setting.config, setting.models.tuned.shape, kind)


def _policy(setting: Setting) -> tuple[Parts, float]:
    config, shape = setting.config, setting.models.tuned.shape
    micro = setting.learnt(config.policy)
    trained = shape.adapter_parameters(config.lora)
    parts, start = _learner(setting, "policy", config.policy, shape, trained, config.model.dtype)
    tokens = micro.rows * config.rollout.max_tokens
    return {
        **parts,
        "activations": _activations(setting, shape, config.lora, micro),
        "logits": chunked_logits_bytes(shape, tokens),
    }, start


def _critic(setting: Setting) -> tuple[Parts, float]:
    config, shape = setting.config, setting.models.critic.shape.with_scalar_head()
    micro = setting.learnt(config.critic)
    trained = shape.adapter_parameters(config.critic.lora) + shape.hidden_size
    parts, start = _learner(setting, "critic", config.critic, shape, trained, "float32")
    return {**parts, "activations": _activations(setting, shape, config.critic.lora, micro)}, start


def _learner(
    setting: Setting, role: str, group: LearnerConfig, shape: Shape, trained: int, dtype: Dtype
) -> tuple[Parts, float]:
    """Return everything but activations, and the bytes before ZeRO-3 has sharded the weights."""
    model = setting.config.model
    frozen = weights_bytes(shape.size, model.dtype, model.quantization)
    libraries = setting.libraries(role, in_group=group.num_ranks > 1)
    state = deepspeed_parts(
        frozen,
        trained,
        dtype,
        group.zero_stage,
        group.num_ranks,
        group.deepspeed.get("zero", {}),
        role in setting.kinds,
    )
    whole = frozen + trained * BYTES[dtype] + libraries
    return {"libraries": libraries, **state}, whole


def _activations(setting: Setting, shape: Shape, lora: LoraConfig, micro: Pass) -> float:
    return adapter_pass_bytes(
        shape,
        lora,
        micro,
        adapter_bytes=micro.num_bytes,
        dropout=0.0,
        quantization=setting.config.model.quantization,
    )


def _reference(setting: Setting) -> tuple[Parts, float]:
    model, shape = setting.config.model, setting.models.tuned.shape
    micro = setting.scored()
    tokens = micro.rows * setting.config.rollout.max_tokens
    return {
        "libraries": setting.libraries("reference"),
        "weights": weights_bytes(shape.size, model.dtype, model.quantization),
        "activations": forward_bytes(shape, micro),
        "logits": chunked_logits_bytes(shape, tokens),
    }, 0.0


def _reward(setting: Setting) -> tuple[Parts, float]:
    """Return a scorer's parts: its models are not quantised, and all are assumed equally large."""
    config, shape = setting.config, setting.models.reward.shape.with_scalar_head()
    count = sum(isinstance(source, RUN_MODELS) for source in config.rewards)
    weights = weights_bytes(shape.size, config.model.dtype)
    passes = forward_bytes(shape, setting.scored())
    return {
        "libraries": setting.libraries("reward"),
        "weights": count * weights,
        "activations": passes if count else 0,
    }, 0.0


def _driver(setting: Setting) -> Parts:
    """Return what the object store holds: an iteration's rollouts and two commits' states."""
    config = setting.config
    tokens = config.ppo.batch_size * setting.longest()
    return {
        "rollouts": tokens * (8 + 4 * 4),  # ids; rollout, old, reference log-probs and values
        "commits": 2 * state_bytes(config, setting.models),
    }


def engine_of(config: Config, shape: Shape, kind: GpuKind | None) -> Engine:
    """Return the engine of a generator on GPUs of a kind, or on a CPU (None).

    A tensor-parallel engine divides weights and heads among its GPUs; each GPU keeps at least one
    head of keys and values.
    """
    rollout, size = config.rollout, config.generators.tensor_parallel_size
    number = BYTES[config.engine_dtype]
    kv_share = min(size, shape.num_kv_heads)
    token = shape.kv_values_per_token * number / kv_share
    weights = {"weights": shape.size.parameters * number / size}
    adapter = shape.adapter_parameters(config.lora.model_copy(update={"r": config.largest_rank}))
    if config.serving == "adapter":
        weights["adapter"] = config.num_adapters * adapter * number / size
    if rollout.engine == "transformers" or kind is None:
        return Engine(_unbounded(config, shape, token) | weights, token)
    held = {
        "libraries": ENGINE_LIBRARIES,
        **weights,
        "logits": SAMPLER_ROWS * shape.vocab_size * SAMPLER_BYTES,
    }
    block = rollout.engine_args.get("block_size") or BLOCK
    if cache := rollout.engine_args.get(CACHE_KEY):  # vLLM takes 0 for not set
        return Engine({**held, "KV cache": cache}, token, block=block)
    utilization = rollout.engine_args.get(UTILIZATION_KEY, UTILIZATION)
    left = utilization * kind.memory_gb * 1e9 - sum(held.values())
    return Engine({**held, "KV cache": max(0.0, left)}, token, max(0.0, -left), block)


def _unbounded(config: Config, shape: Shape, token: float) -> Parts:
    """Return the parts of engines with a configured cache (vLLM on a CPU) or one that grows."""
    rollout = config.rollout
    if rollout.engine == "vllm":
        return {"libraries": CPU_ENGINE, "KV cache": rollout.kv_cache_gb * 2**30}
    rows = rollout.shard_size
    longest = rollout.max_prompt_tokens + rollout.max_tokens
    return {
        "libraries": CPU_ENGINE / 4,
        "logits": rows * shape.vocab_size * SAMPLER_BYTES,
        "KV cache": rows * longest * token,
    }
