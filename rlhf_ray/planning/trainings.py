"""Trained parts of each stage of a run, and memory of a process of a supervised stage."""

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_ray.config import Config
from rlhf_ray.config.model import LoraConfig
from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.planning.memory import (
    BYTES,
    STATE_BYTES,
    Parts,
    Pass,
    Shape,
    adapter_pass_bytes,
    chunked_logits_bytes,
    deepspeed_parts,
    gb,
    is_offloaded,
    optimizer_bytes,
    training_bytes,
    weights_bytes,
    whole_logits_bytes,
    whole_pass_bytes,
)
from rlhf_ray.planning.roles import CPU_LIBRARIES, GPU_LIBRARIES, NCCL, PlannedRole
from rlhf_ray.planning.shapes import Models, PlannedModel


@dataclass(frozen=True)
class PlannedTraining:
    """Memory of one process of a stage, or of a PPO role, with nothing sharded."""

    stage: str
    parameters: int
    trainable: int
    weights_bytes: float
    """Bytes of the frozen weights, quantised as ``model.quantization`` says."""
    training_bytes: int
    """Bytes of weights, gradients and Adam's moments of the trained parameters; no activations."""


@dataclass(frozen=True)
class Trained:
    """A model and the part of it that a stage trains."""

    stage: str
    role: str
    """Its name among the plan's roles."""
    model: PlannedModel
    lora: LoraConfig | None
    is_scalar: bool = False
    unfreeze: list[str] | None = None

    @property
    def shape(self) -> Shape:
        """Shape of the model as it is trained."""
        shape = self.model.shape
        return shape.with_scalar_head() if self.is_scalar else shape

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return self.model.num_trained(self.lora, self.is_scalar, self.unfreeze)


def trained_parts(config: Config, models: Models) -> Iterator[Trained]:
    """Yield what each of the run's stages trains."""
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
    """Return the memory of one process with nothing sharded."""
    trainable = part.trainable
    frozen = _frozen_bytes(config, part, trainable)
    size = part.shape.size.parameters
    return PlannedTraining(part.stage, size, trainable, frozen, training_bytes(trainable))


def stage_roles(config: Config, models: Models, on_gpu: bool) -> list[PlannedRole]:
    """Return the processes of the supervised stages; each stage runs alone."""
    return [
        PlannedRole(
            role=part.role,
            workers=section(config, part).train_workers,
            gpus=int(on_gpu),
            parts=_parts(config, part, on_gpu),
            start=_whole_bytes(config, part, on_gpu),
        )
        for part in trained_parts(config, models)
        if part.role not in ("policy", "critic")
    ]


def _whole_bytes(config: Config, part: Trained, on_gpu: bool) -> float:
    """Return the bytes before stage 3 has divided an adapter's base; whole models load divided."""
    if part.lora is None or zero_stage(config, part) != 3:
        return 0
    trained = part.trainable * STATE_BYTES["weights"]
    return _frozen_bytes(config, part, part.trainable) + trained + _libraries(config, part, on_gpu)


def _libraries(config: Config, part: Trained, on_gpu: bool) -> float:
    in_group = section(config, part).train_workers > 1
    return GPU_LIBRARIES + NCCL * in_group if on_gpu else CPU_LIBRARIES


def section(config: Config, part: Trained) -> SupervisedConfig:
    """Return the stage's section of the config."""
    return getattr(config, part.stage)


def tokens_per_step(config: Config, part: Trained) -> int:
    """Return the tokens of the global batch, with every sequence at full length."""
    settings = section(config, part)
    return settings.batch_size * sequences_of_row(config, part) * tokens_of_sequence(config, part)


def unknown_extents(config: Config, models: Models) -> list[str]:
    """Return notes on what the plan cannot know about the stages."""
    notes = []
    for part in trained_parts(config, models):
        if part.unfreeze and part.model.folder is None:
            notes.append(
                f"{part.stage}.unfreeze: {part.model.path} is not here; all its weights are counted"
            )
        if part.stage in config.run.stages and (stage := zero_stage(config, part)):
            size, ranks = part.trainable, section(config, part).train_workers
            zero = section(config, part).deepspeed.get("zero", {})
            if is_offloaded(zero, "optimizer"):
                needed = gb(optimizer_bytes(size, stage, ranks) + 4 * size / ranks)
                notes.append(
                    f"{part.stage} has its optimizer in main memory, {needed} for each process, "
                    "which is not checked"
                )
    if "ppo" in config.run.stages and (most := config.ppo.filter_groups.max_refills):
        notes.append(
            f"ppo.filter_groups.max_refills {most}: how many prompts are replaced depends on their "
            "scores; times are without refills, of which each samples at most a whole batch again"
        )
    return notes


def _parts(config: Config, part: Trained, on_gpu: bool) -> Parts:
    """Return the parts of a process of transformers.Trainer."""
    micro = _micro_batch(config, part)
    held = _held(config, part, on_gpu)
    if part.lora is None:
        held["weights"] += held.pop("adapter")
    return {
        "libraries": _libraries(config, part, on_gpu),
        **held,
        "activations": _activations(config, part, micro),
        "logits": _logits(config, part, micro),
    }


def _held(config: Config, part: Trained, on_gpu: bool) -> Parts:
    """Return weights and training state: under DDP, which divides nothing, or under ZeRO."""
    settings, trainable = section(config, part), part.trainable
    ranks, frozen = settings.train_workers, _frozen_bytes(config, part, trainable)
    halved = _autocast_bytes(config, part)
    if (stage := zero_stage(config, part)) is not None:
        zero, passes = settings.deepspeed.get("zero", {}), config.model.dtype
        state = deepspeed_parts(frozen, trainable, "float32", stage, ranks, zero, on_gpu, passes)
        # Stage 3 gathers weights in half precision, so there autocast has nothing to copy.
        return {**state, "autocast weights": halved if stage < 3 else 0}
    state = {name: trainable * count for name, count in STATE_BYTES.items()}
    return {
        "weights": frozen,
        "adapter": state["weights"],
        "gradients": state["gradients"],
        "optimizer": state["optimizer"],
        "reduce buffer": 4 * trainable * (ranks > 1),
        "autocast weights": halved,
    }


def zero_stage(config: Config, part: Trained) -> int | None:
    """Return a stage's ZeRO stage; None: without, as always inline, in one process."""
    return None if config.cluster.mode == "inline" else section(config, part).zero_stage


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
    settings, length = section(config, part), tokens_of_sequence(config, part)
    accumulated = settings.trainer.get("gradient_accumulation_steps", 1)
    rows = max(1, settings.batch_size // (settings.train_workers * accumulated))
    return Pass(
        tokens=rows * sequences_of_row(config, part) * length,
        length=length,
        num_bytes=BYTES[config.model.dtype],
        recomputes=settings.gradient_checkpointing,
    )


def sequences_of_row(config: Config, part: Trained) -> int:
    """Return the sequences of one row: two for a pair."""
    is_pair = part.stage == "dpo" or (part.stage == "reward" and config.reward.loss == "pairwise")
    return 2 if is_pair else 1


def tokens_of_sequence(config: Config, part: Trained) -> int:
    """Return the tokens of the longest sequence, or of a packed block."""
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
    """Return the bytes of the half-precision copies that autocast keeps for the backward pass."""
    if part.lora is not None or config.model.dtype == "float32":
        return 0
    return part.shape.size.parameters * BYTES[config.model.dtype]
