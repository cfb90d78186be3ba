"""A generator's engine: what it holds, and how many responses it samples at a time."""

from dataclasses import dataclass

from rlhf_ray.config import Config
from rlhf_ray.placement.hardware import GpuKind
from rlhf_ray.planning.memory import BYTES, Parts
from rlhf_ray.planning.model_shape import Shape

UTILIZATION = 0.92
"""Share of a GPU that vLLM takes, without rollout.engine_args.gpu_memory_utilization."""
ENGINE_LIBRARIES = 2.5e9
"""Bytes of vLLM's CUDA context, its CUDA graphs, and buffers of its largest prefill."""
CPU_ENGINE = 1.4e9
"""Bytes of an idle CPU engine's three processes (measured)."""
SAMPLER_ROWS, SAMPLER_BYTES = 256, 16
"""Rows of logits that vLLM makes room for when it measures itself; bytes of a logit: four tensors
in fp32."""


@dataclass(frozen=True)
class Engine:
    """One generator."""

    parts: Parts
    """Bytes on each of its GPUs."""
    token_bytes: float
    """Of a token in its KV cache, on each of its GPUs."""
    lacking: float = 0.0
    """Bytes that it takes beyond its share of a GPU before it has any cache."""

    def sequences(self, tokens: int) -> int:
        """Sequences of so many tokens that its KV cache holds at a time."""
        return max(0, int(self.parts["KV cache"] // (self.token_bytes * tokens)))


def engine_of(config: Config, shape: Shape, kind: GpuKind | None) -> Engine:
    """A generator on GPUs of a kind; None: on a CPU.

    Weights and heads are divided among the GPUs of a tensor-parallel engine; heads of keys and
    values no further than one each.
    """
    rollout, size = config.rollout, config.generators.tensor_parallel_size
    number = BYTES[config.engine_dtype]
    kv_share = min(size, shape.num_kv_heads)
    token = shape.kv_values_per_token * number / kv_share
    weights = {"weights": shape.size.parameters * number / size}
    adapter = shape.adapter_parameters(config.lora.model_copy(update={"r": config.largest_rank}))
    if config.serving == "adapter":
        weights["adapter"] = adapter * number / size
    if rollout.engine == "transformers" or kind is None:
        return Engine(_unbounded(config, shape, token) | weights, token)
    utilization = rollout.engine_args.get("gpu_memory_utilization", UTILIZATION)
    held = {
        "libraries": ENGINE_LIBRARIES,
        **weights,
        "logits": SAMPLER_ROWS * shape.vocab_size * SAMPLER_BYTES,
    }
    left = utilization * kind.memory_gb * 1e9 - sum(held.values())
    return Engine({**held, "KV cache": max(0.0, left)}, token, lacking=max(0.0, -left))


def _unbounded(config: Config, shape: Shape, token: float) -> Parts:
    """Engines that are told how much cache to make, or make what they need."""
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
