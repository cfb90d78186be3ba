"""PPO's learner groups and the reference."""

from typing import Literal

from pydantic import field_validator, model_validator

from rlhf_ray.config.model import LoraConfig, ShapeConfig
from rlhf_ray.config.section import (
    MOST_PROCESSES,
    PassThrough,
    Section,
    adjustable,
    changeable,
    fixed,
    refuse_owned,
)


def _refuse_owned_deepspeed(section: str, given: PassThrough) -> PassThrough:
    owned = {
        "zero_optimization": f"{section}.zero_stage (further ZeRO keys: {section}.deepspeed.zero)",
        "train_batch_size": "ppo.mini_batch_size",
        "train_micro_batch_size_per_gpu": "ppo.max_tokens_per_micro_batch",
        "gradient_accumulation_steps": "ppo.max_tokens_per_micro_batch",
        "gradient_clipping": "ppo.max_grad_norm",
        "optimizer": "ppo.learning_rate and critic.learning_rate",
        "scheduler": "ppo.learning_rate",
        "bf16": "model.dtype",
        "fp16": "model.dtype",
    }
    return refuse_owned(f"{section}.deepspeed", given, owned)


class LearnerConfig(Section):
    """A DeepSpeed group of learners."""

    num_ranks: int = changeable(
        1, unit="processes", ge=1, le=MOST_PROCESSES, description="Processes of the group."
    )
    zero_stage: Literal[1, 2, 3] = changeable(
        2,
        unit="–",
        description="ZeRO stage; use 3 only if the frozen base does not fit one device.",
    )
    gradient_checkpointing: bool = changeable(
        False, description="Recompute activations in the backward pass: slower, less memory."
    )
    deepspeed: PassThrough = changeable(
        {}, description="More keys of DeepSpeed's config; `zero` holds more ZeRO keys."
    )


class PolicyConfig(LearnerConfig):
    """The policy's learners."""

    tuning: str = changeable(
        "lora", description="lora is the only value: only adapters are synchronised."
    )

    @field_validator("deepspeed")
    @classmethod
    def _own_keys(cls, given: PassThrough) -> PassThrough:
        return _refuse_owned_deepspeed("policy", given)

    @field_validator("tuning")
    @classmethod
    def _adapters_alone(cls, tuning: str) -> str:
        if tuning != "lora":
            raise ValueError(
                f"{tuning!r} is not supported: each iteration sends the policy to every "
                "generator, and only an adapter is small enough for that; use lora (stages with "
                "full fine-tuning: pretrain, sft.tuning, reward.tuning)"
            )
        return tuning


class CriticConfig(LearnerConfig):
    """The critic's learners."""

    init: Literal["sft", "reward"] = fixed(
        "sft",
        description="Initial model. sft: the SFT model with a value head of zeros; reward: the "
        "run's reward model (reward.path or the stage's) with its head, so that values start as "
        "scores.",
    )
    path: str | None = fixed(
        None, description="Initial model in place of the SFT model, with a value head of zeros."
    )
    shape: ShapeConfig | None = changeable(
        None, description="Shape of critic.path, used only by the command plan; none: the policy's."
    )
    learning_rate: float = adjustable(
        1e-5, unit="–", gt=0, description="Learning rate; the peak of ppo.scheduler."
    )
    lora: LoraConfig = fixed(
        LoraConfig(), description="Adapter; the value head is trained in full."
    )

    @field_validator("deepspeed")
    @classmethod
    def _own_keys(cls, given: PassThrough) -> PassThrough:
        return _refuse_owned_deepspeed("critic", given)

    @model_validator(mode="after")
    def _one_start(self) -> "CriticConfig":
        if self.init == "reward" and self.path is not None:
            raise ValueError(
                f"critic.init reward and critic.path {self.path!r} both set the critic's initial "
                "model; leave critic.path out (reward.path names the reward model), or set "
                "critic.init=sft"
            )
        return self


class ReferenceConfig(Section):
    """The frozen reference."""

    kind: Literal["own", "policy_base"] = changeable(
        "own",
        description="own: separate processes, in parallel with the learners; policy_base: the "
        "policy's learners with their adapter off, which saves a copy of the model.",
    )
    num_workers: int = changeable(
        1,
        unit="processes",
        ge=1,
        le=MOST_PROCESSES,
        description="Reference processes, with kind own.",
    )

    @property
    def num_processes(self) -> int:
        """Processes that hold the reference and nothing else."""
        return self.num_workers if self.kind == "own" else 0

    @model_validator(mode="after")
    def _workers_of_its_own(self) -> "ReferenceConfig":
        if self.kind == "policy_base" and self.num_workers != 1:
            raise ValueError(
                f"reference.num_workers {self.num_workers} has no effect with reference.kind "
                "policy_base, because the policy's learners do the work; leave it out, or set "
                "reference.kind=own"
            )
        return self
