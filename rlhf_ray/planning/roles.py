"""What a worker of each role of PPO holds, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rlhf_ray.config import Config
from rlhf_ray.config.model import LoraConfig
from rlhf_ray.config.ppo import LearnerConfig
from rlhf_ray.placement.hardware import GpuKind
from rlhf_ray.placement.layout import RUN_MODELS, demands
from rlhf_ray.planning.activations import (
    Pass,
    adapter_pass_bytes,
    chunked_logits_bytes,
    forward_bytes,
)
from rlhf_ray.planning.generators import Engine, engine_of
from rlhf_ray.planning.memory import ADAM_BYTES, BYTES, Parts, deepspeed_parts, weights_bytes
from rlhf_ray.planning.model_shape import Shape
from rlhf_ray.planning.shapes import Models

GPU_LIBRARIES = 1.0e9
"""Bytes of a process's CUDA context, its kernels, and the work space of cuBLAS."""
NCCL = 0.5e9
"""Bytes of the buffers of a group's channels."""
CPU_LIBRARIES = 0.37e9
"""Bytes that an idle role's process takes on a CPU (measured)."""


@dataclass(frozen=True)
class PlannedRole:
    """The workers of one role, or of one supervised stage."""

    role: str
    workers: int
    gpus: float
    """Of one worker; 0: none."""
    parts: Mapping[str, float]
    """Bytes by part at the peak of its work, on each of its GPUs; in memory where it has none."""
    start: float = 0.0
    """Bytes there while it loads, where that is before anything is sharded."""

    @property
    def total(self) -> float:
        """Bytes at the peak of its work."""
        return sum(self.parts.values())

    @property
    def peak(self) -> float:
        """The most bytes that it ever takes."""
        return max(self.total, self.start)


@dataclass(frozen=True)
class Setting:
    """What the memory of roles depends on."""

    config: Config
    models: Models
    kinds: Mapping[str, GpuKind | None]
    """Role -> GPUs that it is on; a role that is not here has none."""

    def libraries(self, role: str, in_group: bool = False) -> float:
        """Bytes of an idle process."""
        return GPU_LIBRARIES + NCCL * in_group if role in self.kinds else CPU_LIBRARIES

    def longest(self) -> int:
        """Tokens of the longest rollout."""
        return self.config.rollout.max_prompt_tokens + self.config.rollout.max_tokens

    def micro_batch(self, most_rows: int) -> Pass:
        """The largest pass over that many rollouts, all of full length."""
        limit, longest = self.config.ppo.max_tokens_per_micro_batch, self.longest()
        rows = min(limit // longest, most_rows)
        return Pass(rows * longest, longest, BYTES[self.config.model.dtype])

    def learnt(self, group: LearnerConfig) -> Pass:
        """The largest pass that a rank learns from: within its part of a mini-batch."""
        micro = self.micro_batch(self.config.ppo.mini_batch_size // group.num_ranks)
        return replace(micro, recomputes=group.gradient_checkpointing)

    def scored(self) -> Pass:
        """The largest pass of a scorer: within a shard."""
        return self.micro_batch(self.config.rollout.shard_size)


def ppo_roles(setting: Setting) -> list[PlannedRole]:
    """The roles that the config needs; the generators' KV cache takes what is left to them."""
    parts = {
        "policy": _policy,
        "critic": _critic,
        "reference": _reference,
        "reward": _reward,
    }
    roles = []
    for demand in demands(setting.config):
        gpus = demand.gpus if demand.role in setting.kinds else 0
        if demand.role == "generator":
            held, start = engine(setting).parts, 0.0
        else:
            held, start = parts[demand.role](setting)
        roles.append(PlannedRole(demand.role, demand.workers, gpus, held, start))
    return [*roles, PlannedRole("driver", 1, 0, _driver(setting))]


def state_bytes(config: Config, models: Models) -> float:
    """What a commit holds of the learners: weights that are trained, and their optimizers."""
    trained = models.tuned.shape.adapter_parameters(config.lora)
    if config.may_have_critic:
        critic = models.critic.shape
        trained += critic.adapter_parameters(config.critic.lora) + critic.hidden_size
    return trained * (4 + ADAM_BYTES + BYTES[config.model.dtype])


def engine(setting: Setting) -> Engine:
    """A generator's engine."""
    kind = setting.kinds.get("generator")
    return engine_of(setting.config, setting.models.tuned.shape, kind)


def _policy(setting: Setting) -> tuple[Parts, float]:
    config, shape = setting.config, setting.models.tuned.shape
    micro = setting.learnt(config.policy)
    trained = shape.adapter_parameters(config.lora)
    parts, start = _learner(setting, "policy", config.policy, shape, trained)
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
    parts, start = _learner(setting, "critic", config.critic, shape, trained)
    return {
        **parts,
        "activations": _activations(setting, shape, config.critic.lora, micro),
    }, start


def _learner(
    setting: Setting, role: str, group: LearnerConfig, shape: Shape, trained: int
) -> tuple[Parts, float]:
    """Everything but activations, and what is there before ZeRO 3 has sharded the weights."""
    model = setting.config.model
    frozen = weights_bytes(shape.size, model.dtype, model.quantization)
    libraries = setting.libraries(role, in_group=group.num_ranks > 1)
    state = deepspeed_parts(
        frozen,
        trained,
        model.dtype,
        group.zero_stage,
        group.num_ranks,
        group.deepspeed.get("zero", {}),
        role in setting.kinds,
    )
    whole = frozen + trained * BYTES[model.dtype] + libraries
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
    """Its own models are not quantised; those of other sources are taken for as large."""
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
    """The object store: an iteration's rollouts and columns, and the states of two commits."""
    config = setting.config
    tokens = config.ppo.batch_size * setting.longest()
    return {
        "rollouts": tokens * (8 + 4 * 4),  # ids; rollout, old, reference log-probs and values
        "commits": 2 * state_bytes(config, setting.models),
    }
