"""The supervised stages: pretrain, sft, reward, dpo."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlhf_ray.config.data import Sources
from rlhf_ray.config.model import LoraConfig, ShapeConfig
from rlhf_ray.config.rewards import PairJudgeConfig
from rlhf_ray.config.section import (
    MOST_PROCESSES,
    PassThrough,
    Section,
    adjustable,
    changeable,
    fixed,
    is_mapping,
    refuse_owned,
    refuse_secrets,
)

Tuning = Literal["lora", "full"]

_OWNED = {
    "output_dir": "run.dir",
    "max_steps": "{section}.steps",
    "per_device_train_batch_size": "{section}.batch_size and {section}.train_workers",
    "learning_rate": "{section}.learning_rate",
    "lr_scheduler_type": "{section}.scheduler",
    "warmup_steps": "{section}.warmup_steps",
    "warmup_ratio": "{section}.warmup_share",
    "weight_decay": "{section}.weight_decay",
    "seed": "run.seed",
    "num_train_epochs": "{section}.epochs",
    "eval_strategy": "{section}.eval_every",
    "eval_steps": "{section}.eval_every",
    "gradient_checkpointing": "{section}.gradient_checkpointing",
    "gradient_checkpointing_kwargs": "{section}.gradient_checkpointing",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "report_to": "the stage",
    "save_strategy": "the stage",
    "eval_on_start": "the stage",
    "label_names": "the stage",
    "logging_nan_inf_filter": "the stage",
    "remove_unused_columns": "the stage",
    "deepspeed": "{section}.zero_stage (further keys of DeepSpeed: {section}.deepspeed)",
}

_OWNED_DEEPSPEED = {
    "zero_optimization": "{section}.zero_stage (further ZeRO keys: {section}.deepspeed.zero)",
    "train_batch_size": "{section}.batch_size",
    "train_micro_batch_size_per_gpu": "{section}.batch_size and {section}.train_workers",
    "gradient_accumulation_steps": "{section}.trainer.gradient_accumulation_steps",
    "gradient_clipping": "{section}.trainer.max_grad_norm",
    "optimizer": "{section}.learning_rate and {section}.trainer.optim",
    "scheduler": "{section}.scheduler",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "torch_autocast": "model.dtype",
    "checkpoint": "the stage",
}


Packing = Literal["isolate", "concat", "none"]
_PACKING = (
    "isolate: whole texts that do not attend to each other, padded; concat: texts end to end, cut "
    "into equal blocks (as StackLLaMA does); none: one text a row, padded to the batch's longest."
)
_BLOCK_SIZE = "Length of a packed block; without packing, of the longest text."


class SupervisedConfig(Section):
    """Keys of every stage that transformers.Trainer runs."""

    steps: int = fixed(300, unit="steps", ge=1, description="Optimizer steps.")
    epochs: float | None = fixed(
        None, unit="passes", gt=0, description="Passes over the training rows; replaces `steps`."
    )
    batch_size: int = fixed(
        16, unit="sequences", ge=1, description="Global batch; for reward and dpo in pairs."
    )
    learning_rate: float = adjustable(1e-4, unit="–", gt=0, description="Peak learning rate.")
    scheduler: Literal["cosine", "linear", "constant"] = adjustable(
        "cosine", description="Decay of the learning rate."
    )
    final_lr_share: float = adjustable(
        0.0,
        unit="share",
        ge=0,
        le=1,
        description="Final learning rate of cosine, relative to the peak.",
    )
    warmup_steps: int = adjustable(
        0,
        unit="steps",
        ge=0,
        description="Steps of linear warm-up; the minimum if warmup_share is set.",
    )
    warmup_share: float = adjustable(
        0.0, unit="share", ge=0, lt=1, description="Warm-up as a share of all steps."
    )
    weight_decay: float = adjustable(0.0, unit="–", ge=0, description="AdamW's weight decay.")
    train_workers: int = changeable(
        1, unit="processes", ge=1, description="Data-parallel training processes."
    )
    gradient_checkpointing: bool = changeable(
        False, description="Recompute activations in the backward pass: slower, less memory."
    )
    eval_rows: int = fixed(
        200,
        unit="rows",
        ge=1,
        description="Held-out rows for the numbers before and after training.",
    )
    eval_every: Annotated[int, Field(ge=1)] | Literal["epoch"] | None = fixed(
        None,
        unit="steps",
        description="Optimizer steps between evaluations on the held-out rows, or `epoch`; none: "
        "only before and after.",
    )
    zero_stage: Literal[1, 2, 3] | None = changeable(
        None,
        unit="–",
        description="DeepSpeed's ZeRO stage, which divides over the processes: 1 the optimizer, 2 "
        "also the gradients, 3 also the weights; none: each process holds all. Inline mode has "
        "nothing to divide.",
    )
    deepspeed: PassThrough = changeable(
        {},
        description="More keys of DeepSpeed's config, with zero_stage; `zero` holds more ZeRO "
        "keys, such as `{offload_optimizer: {device: cpu}}`.",
    )
    trainer: PassThrough = fixed({}, description="More TrainingArguments.")

    @classmethod
    def section(cls) -> str:
        """Return the name of the stage, which is that of its section."""
        return cls.__name__.removesuffix("Config").lower()

    @field_validator("trainer")
    @classmethod
    def _own_keys(cls, trainer: PassThrough) -> PassThrough:
        section = cls.section()
        owned = {key: value.format(section=section) for key, value in _OWNED.items()}
        refuse_secrets(f"{section}.trainer", trainer, "export HF_TOKEN instead")
        return refuse_owned(f"{section}.trainer", trainer, owned)

    @field_validator("deepspeed")
    @classmethod
    def _own_deepspeed_keys(cls, given: PassThrough) -> PassThrough:
        section = cls.section()
        owned = {key: value.format(section=section) for key, value in _OWNED_DEEPSPEED.items()}
        refuse_owned(f"{section}.deepspeed", given, owned)
        if not is_mapping(zero := given.get("zero", {})):
            raise ValueError(f"{section}.deepspeed.zero: expected a mapping, got {zero!r}")
        refuse_owned(f"{section}.deepspeed.zero", zero, {"stage": f"{section}.zero_stage"})
        return given

    @model_validator(mode="after")
    def _deepspeed_is_used(self) -> Self:
        if self.deepspeed and self.zero_stage is None:
            section = self.section()
            raise ValueError(
                f"{section}.deepspeed has no effect without {section}.zero_stage; set "
                f"{section}.zero_stage=2 or 3, or leave {section}.deepspeed out"
            )
        return self

    def num_warmup_steps(self, num_steps: int) -> int:
        """Return the warm-up steps of a training with ``num_steps`` steps."""
        return max(self.warmup_steps, round(self.warmup_share * num_steps))

    @model_validator(mode="after")
    def _end_of_cosine(self) -> Self:
        if self.final_lr_share and self.scheduler != "cosine":
            section = self.section()
            raise ValueError(
                f"{section}.final_lr_share {self.final_lr_share:g} needs {section}.scheduler "
                f"cosine, got {self.scheduler}; leave it out"
            )
        return self


class UnfreezeConfig(SupervisedConfig):
    """Keys of a stage that may train only some of the model's own weights."""

    unfreeze: list[str] | None = fixed(
        None,
        min_length=1,
        description="Modules to train, by the start of their names, such as [transformer.h.11, "
        "transformer.ln_f]; all others are frozen. Needs tuning full. none: train all.",
    )

    @model_validator(mode="after")
    def _unfreezes_weights(self) -> Self:
        tuning = getattr(self, "tuning", "full")
        if self.unfreeze is not None and tuning != "full":
            section = self.section()
            raise ValueError(
                f"{section}.unfreeze names weights of the model, but {section}.tuning {tuning} "
                f"trains only an adapter; set {section}.tuning=full, or leave {section}.unfreeze "
                "out"
            )
        return self


class PretrainConfig(UnfreezeConfig):
    """Causal language modelling on packed text, all weights trained."""

    block_size: int = fixed(128, unit="tokens", ge=8, description=_BLOCK_SIZE)
    packing: Packing = fixed("isolate", description=_PACKING)


class SftConfig(UnfreezeConfig):
    """Supervised fine-tuning on question and answer, packed."""

    path: str | None = fixed(None, description="Finished SFT model; if set, the stage is skipped.")
    block_size: int = fixed(128, unit="tokens", ge=8, description=_BLOCK_SIZE)
    packing: Packing = fixed("isolate", description=_PACKING)
    loss_on: Literal["all", "completion", "assistant"] = fixed(
        "all",
        description="Tokens in the loss: all, those of the last answer, or those of every "
        "assistant turn of a chat.",
    )
    preferred_only: bool = fixed(
        True, description="Train only on answers that won at least one pair (as StackLLaMA does)."
    )
    tuning: Tuning = fixed(
        "lora", description="lora: train an adapter, merged afterwards; full: train all weights."
    )
    lora: LoraConfig = fixed(LoraConfig(), description="Adapter, with tuning lora.")


class PairsConfig(SupervisedConfig):
    """Keys of a stage that trains on pairs of a preferred and a rejected answer."""

    max_pairs: int | None = fixed(
        None, unit="pairs", ge=1, description="Most training pairs, or single answers, to use."
    )
    judge: PairJudgeConfig | None = fixed(
        None,
        description="Language model that labels the pairs, if rows of data.preferences have "
        "`completion_a` and `completion_b`; none: they have `chosen` and `rejected`.",
    )


PointwiseLoss = Literal["bce", "mse"]


class RewardConfig(PairsConfig, UnfreezeConfig):
    """The reward model, and the scorers that run it in PPO."""

    path: str | None = fixed(
        None,
        description="Finished sequence-classification model with one label; if set, the stage is "
        "skipped.",
    )
    shape: ShapeConfig | None = changeable(
        None,
        description="Shape of the reward model, used only by the command plan; none: the policy's.",
    )
    benchmark: Sources | None = changeable(
        None,
        description="Pairs to measure the reward model on, such as RewardBench, with their kind "
        "in a column `subset`; also used with reward.path.",
    )
    num_workers: int = changeable(
        1, unit="processes", ge=1, le=MOST_PROCESSES, description="Scorer processes."
    )
    loss: Literal["pairwise"] | PointwiseLoss = fixed(
        "pairwise",
        description="pairwise: which answer of a pair is better. For single answers in "
        "data.preferences: bce: whether an answer was liked (column `label`: true or false); mse: "
        "how it was rated (column `score`: a number).",
    )
    centre: float = fixed(
        0.0,
        unit="–",
        ge=0,
        description="Weight of mean((r_chosen + r_rejected)^2), with loss pairwise.",
    )
    margin: float = fixed(
        0.0,
        unit="score",
        ge=0,
        description="Difference of scores by which the chosen answer is to win, with loss "
        "pairwise; it is subtracted before the sigmoid.",
    )
    tuning: Tuning = fixed(
        "lora", description="lora: train an adapter and the head; full: train all weights."
    )
    lora: LoraConfig = fixed(
        LoraConfig(r=8, alpha=32.0, dropout=0.1),
        description="Adapter, with tuning lora; the head is trained in full.",
    )

    @model_validator(mode="after")
    def _pairs_alone(self) -> Self:
        for key in ("centre", "margin", "judge"):
            if self.loss != "pairwise" and getattr(self, key):
                raise ValueError(
                    f"reward.{key} needs pairs, but reward.loss {self.loss} reads single answers; "
                    "leave it out, or set reward.loss=pairwise"
                )
        return self


class DpoConfig(PairsConfig):
    """Direct preference optimisation of the SFT model, instead of a reward model and PPO."""

    learning_rate: float = adjustable(5e-5, unit="–", gt=0, description="Peak learning rate.")
    beta: float = adjustable(
        0.1, unit="1/nat", gt=0, description="Strength of the pull towards the SFT model."
    )
    loss: Literal["sigmoid", "ipo"] = fixed("sigmoid", description="Loss function.")
    per_token: bool = fixed(
        False,
        description="ipo on log-ratios divided by the answers' numbers of tokens, as TRL computes "
        "it; false: on their sums, as in the paper.",
    )
    label_smoothing: float = adjustable(
        0.0,
        unit="probability",
        ge=0,
        lt=0.5,
        description="Probability that a pair's label is swapped (sigmoid only).",
    )
    lora: LoraConfig = fixed(LoraConfig(dropout=0.0), description="Adapter.")

    @model_validator(mode="after")
    def _keys_of_one_loss(self) -> "DpoConfig":
        if self.loss == "sigmoid" and self.per_token:
            raise ValueError("dpo.per_token needs dpo.loss ipo, got sigmoid; leave it out")
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                f"dpo.label_smoothing {self.label_smoothing:g} needs dpo.loss sigmoid; set it to "
                "0 for ipo"
            )
        return self
