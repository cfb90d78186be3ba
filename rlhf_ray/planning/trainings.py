"""What the supervised stages of a run train, and what one of their processes holds."""

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_ray.config import Config
from rlhf_ray.config.model import LoraConfig
from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.planning.activations import (
    Pass,
    adapter_pass_bytes,
    chunked_logits_bytes,
    whole_logits_bytes,
    whole_pass_bytes,
)
from rlhf_ray.planning.memory import BYTES, STATE_BYTES, Parts, training_bytes, weights_bytes
from rlhf_ray.planning.model_shape import Shape
from rlhf_ray.planning.roles import CPU_LIBRARIES, GPU_LIBRARIES, NCCL, PlannedRole
from rlhf_ray.planning.shapes import Models, PlannedModel


@dataclass(frozen=True)
class PlannedTraining:
    """What one process of a stage, or of a role of PPO, holds where nothing is sharded."""

    stage: str
    parameters: int
    trainable: int
    weights_bytes: float
    """Of what is frozen, as ``model.quantization`` has it."""
    training_bytes: int
    """Weights, gradients and Adam's moments of what is trained. Activations come on top."""


@dataclass(frozen=True)
class Trained:
    """A model, and what of it is trained."""

    stage: str
    role: str
    """Its name among the roles of the plan."""
    model: PlannedModel
    lora: LoraConfig | None
    is_scalar: bool = False
    unfreeze: list[str] | None = None

    @property
    def shape(self) -> Shape:
        """Of the model as it is trained."""
        shape = self.model.shape
        return shape.with_scalar_head() if self.is_scalar else shape

    @property
    def trainable(self) -> int:
        """Numbers that change."""
        return self.model.num_trained(self.lora, self.is_scalar, self.unfreeze)


def trained_parts(config: Config, models: Models) -> Iterator[Trained]:
    """Every training of the run's stages."""
    sft, reward, stages = config.sft, config.reward, config.run.stages
    if "pretrain" in stages:
        yield Trained("pretrain", "pretrain", models.base, None, unfreeze=config.pretrain.unfreeze)
    if "sft" in stages and sft.path is None:
        lora = sft.lora if sft.tuning == "lora" else None
        yield Trained("sft", "sft", models.base, lora, unfreeze=sft.unfreeze)
    if "reward" in stages and reward.path is None:
        lora = reward.lora if reward.tuning == "lora" else None
        yield Trained("reward", "reward_model", models.tuned, lora, True, reward.unfreeze)
    if "dpo" in stages:
        yield Trained("dpo", "dpo", models.tuned, config.dpo.lora)
    if "ppo" in stages:
        yield Trained("ppo policy", "policy", models.tuned, config.lora)
    if "ppo" in stages and config.may_have_critic:
        yield Trained("ppo critic", "critic", models.critic, config.critic.lora, True)


def planned_training(config: Config, part: Trained) -> PlannedTraining:
    """What one process holds where nothing is sharded."""
    trainable = part.trainable
    frozen = _frozen_bytes(config, part, trainable)
    size = part.shape.size.parameters
    return PlannedTraining(part.stage, size, trainable, frozen, training_bytes(trainable))


def stage_roles(config: Config, models: Models, on_gpu: bool) -> list[PlannedRole]:
    """The processes of the supervised stages, each stage by itself."""
    return [
        PlannedRole(
            role=part.role,
            workers=section(config, part).train_workers,
            gpus=int(on_gpu),
            parts=_parts(config, part, on_gpu),
        )
        for part in trained_parts(config, models)
        if part.role not in ("policy", "critic")
    ]


def section(config: Config, part: Trained) -> SupervisedConfig:
    """The stage's own part of the config."""
    return getattr(config, part.stage)


def tokens_per_step(config: Config, part: Trained) -> int:
    """Of the global batch, where every sequence has its full length."""
    settings = section(config, part)
    return settings.batch_size * _sequences(config, part) * _length(config, part)


def unknown_extents(config: Config, models: Models) -> list[str]:
    """What a plan cannot know of the stages' trainings."""
    notes = []
    for part in trained_parts(config, models):
        if part.unfreeze and part.model.folder is None:
            notes.append(
                f"{part.stage}.unfreeze: {part.model.path} is not here, so all weights were counted"
            )
        if part.role not in ("policy", "critic") and section(config, part).epochs is not None:
            notes.append(f"{part.stage}.epochs: its rows are not counted yet, nor its days")
    return notes


def _parts(config: Config, part: Trained, on_gpu: bool) -> Parts:
    """transformers.Trainer under DistributedDataParallel: nothing is sharded."""
    settings, trainable = section(config, part), part.trainable
    in_group = settings.train_workers > 1
    libraries = GPU_LIBRARIES + NCCL * in_group if on_gpu else CPU_LIBRARIES
    micro = _micro_batch(config, part)
    state = {name: trainable * count for name, count in STATE_BYTES.items()}
    return {
        "libraries": libraries,
        "weights": _frozen_bytes(config, part, trainable) + (0 if part.lora else state["weights"]),
        "adapter": state["weights"] if part.lora else 0,
        "gradients": state["gradients"],
        "optimizer": state["optimizer"],
        "reduce buffer": 4 * trainable * in_group,
        "autocast weights": _autocast_bytes(config, part),
        "activations": _activations(config, part, micro),
        "logits": _logits(config, part, micro),
    }


def _activations(config: Config, part: Trained, micro: Pass) -> float:
    if part.lora is None:
        return whole_pass_bytes(part.shape, micro)
    return adapter_pass_bytes(
        part.shape,
        part.lora,
        micro,
        adapter_bytes=4,  # peft keeps adapters in fp32
        dropout=part.lora.dropout,
        quantization=config.model.quantization,
    )


def _logits(config: Config, part: Trained, micro: Pass) -> float:
    if part.is_scalar:
        return 0
    if part.stage == "dpo":
        return chunked_logits_bytes(part.shape, micro.tokens)
    return whole_logits_bytes(part.shape, micro.tokens, micro.num_bytes)


def _micro_batch(config: Config, part: Trained) -> Pass:
    settings, length = section(config, part), _length(config, part)
    accumulated = settings.trainer.get("gradient_accumulation_steps", 1)
    rows = max(1, settings.batch_size // (settings.train_workers * accumulated))
    return Pass(
        tokens=rows * _sequences(config, part) * length,
        length=length,
        num_bytes=BYTES[config.model.dtype],
        recomputes=settings.gradient_checkpointing,
    )


def _sequences(config: Config, part: Trained) -> int:
    """Of one row: a pair has two."""
    is_pair = part.stage == "dpo" or (part.stage == "reward" and config.reward.loss == "pairwise")
    return 2 if is_pair else 1


def _length(config: Config, part: Trained) -> int:
    return getattr(section(config, part), "block_size", config.model.max_length)


def _frozen_bytes(config: Config, part: Trained, trainable: int) -> float:
    size, model = part.shape.size, config.model
    if part.lora is None:
        return 4.0 * (size.parameters - trainable)  # all weights are in float32 there
    # Supervised stages compute in float32 what a quantised base keeps in half precision.
    widened = model.quantization != "none" and not part.stage.startswith("ppo")
    dtype = "float32" if widened else model.dtype
    return weights_bytes(size, dtype, model.quantization)


def _autocast_bytes(config: Config, part: Trained) -> float:
    """Copies in half precision that autocast keeps of fp32 weights for the backward pass."""
    if part.lora is not None or config.model.dtype == "float32":
        return 0
    return part.shape.size.parameters * BYTES[config.model.dtype]
