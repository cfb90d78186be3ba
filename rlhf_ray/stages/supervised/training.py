"""What every training process of a supervised stage runs: transformers.Trainer on one stage's work.

The same function runs in Ray Train's workers and, inline, in the driver's own process.
"""

import dataclasses
import difflib
import functools
import json
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from datasets import Dataset, load_from_disk
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from rlhf_ray.config import Config
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.data.rendering.tokens import pad_id
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import loading
from rlhf_ray.models.freezing import train_only
from rlhf_ray.models.parameters import parameter_groups
from rlhf_ray.stages.supervised.step_log import StepLog, held_out_numbers

TRAIN, HELD_OUT = "train", "held_out"
"""Names of the two tokenised data sets of a stage."""

HELD_OUT_SHARE = 0.05
"""Share of the rows, the last ones, that is held out where the data has no held-out set."""

_SIZES = ("steps", "parameters", "trainable_parameters", "parameter_groups")


@dataclasses.dataclass(frozen=True)
class Training(ABC):
    """One supervised stage as its training processes get it: picklable, paths absolute.

    Attributes:
        config: the run's.
        folder: the stage's folder; every training process must see it.
        base: folder or hub name of the model that is trained.
    """

    name: ClassVar[str]
    config: Config
    folder: Path
    base: str

    @property
    def settings(self) -> SupervisedConfig:
        """The stage's own config section."""
        return getattr(self.config, self.name)

    @property
    def all_weights(self) -> bool:
        """Whether all weights are trained: in fp32, computed and saved in ``model.dtype``."""
        return False

    @property
    def autocast(self) -> str | None:
        """``bf16`` or ``fp16``: compute in half precision over fp32 weights; None: as they are."""
        halves = {"bfloat16": "bf16", "float16": "fp16"}
        return halves.get(self.config.model.dtype) if self.all_weights else None

    @property
    def model_settings(self) -> ModelConfig:
        """How the base is loaded."""
        settings = self.config.model
        return settings.model_copy(update={"dtype": "float32"}) if self.all_weights else settings

    @abstractmethod
    def load_model(self) -> Any:
        """The model, its trainable weights requiring gradients."""

    def partly_frozen(self, model: Any, *also_trained: str) -> Any:
        """The model with what ``<stage>.unfreeze`` leaves out frozen; the given modules never."""
        prefixes = getattr(self.settings, "unfreeze", None)
        if prefixes is not None:
            train_only(model, [*prefixes, *also_trained], f"{self.name}.unfreeze")
        return model

    def trainer(self, **parts: Any) -> Trainer:
        """The Trainer over the given parts; a stage with a loss of its own returns its own."""
        return Trainer(**parts)

    @abstractmethod
    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch of the tokenised data set."""

    @abstractmethod
    def save(self, model: Any) -> None:
        """Write the result into the stage's folder; called in one process."""

    def save_whole(self, model: Any) -> None:
        """Write a model all of whose weights were trained."""
        model.to(getattr(torch, self.config.model.dtype))
        loading.save_model(model, loading.load_tokenizer(self.base), self.folder / "model")

    def save_adapter(self, model: Any, name: str = "model") -> None:
        """Write an adapter into a folder of the stage's."""
        tokenizer = loading.load_tokenizer(self.base)
        loading.save_adapter(model, tokenizer, self.folder / name, self.base)

    @property
    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]] | None:
        """Computes some of `HELD_OUT_METRICS` on the held-out rows; None: their loss alone."""
        return None

    @functools.cached_property
    def _pad_id(self) -> int:
        return pad_id(loading.load_tokenizer(self.base))

    @property
    def data(self) -> Path:
        """Folder of the tokenised data sets."""
        return self.folder / "tokens"

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints."""
        return self.folder / "trainer"

    @property
    def metrics_file(self) -> Path:
        """Where each logged step goes, as one JSON line."""
        return self.folder / "metrics.jsonl"

    @property
    def evaluations_file(self) -> Path:
        """Where each evaluation goes, as one JSON line, with ``<stage>.eval_every``."""
        return self.folder / "eval.jsonl"


def train(training: Training, num_processes: int) -> dict[str, Any]:
    """Train one stage in this process, as one of ``num_processes`` that all call this.

    Goes on from the last checkpoint in ``training.checkpoints`` where there is one.

    Returns:
        ``before_loss`` and ``after_loss`` on the held-out rows (a mean over tokens for language
        models, and what else `Training.metrics` gives), ``steps``; ``parameters``,
        ``trainable_parameters``, and these by module as ``parameter_groups``.

    Raises:
        ConfigError: the stage's folder is not visible here, or a TrainingArguments value is wrong.
        DivergenceError: the loss is not finite.
    """
    _require_folder(training)
    transformers.set_seed(training.config.run.seed)
    model = training.load_model()
    step_log = StepLog(
        training.name, training.settings, training.metrics_file, training.evaluations_file
    )
    trainer = training.trainer(
        model=model,
        args=arguments(training, num_processes),
        train_dataset=_load(training, TRAIN),
        eval_dataset=_load(training, HELD_OUT),
        data_collator=training.collate,
        compute_metrics=training.metrics,
        callbacks=[step_log],
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_checkpoint(training)
    with closing(step_log):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
        is_done = evaluations[-1]["step"] == trainer.state.global_step
        before, after = evaluations[0], evaluations[-1] if is_done else trainer.evaluate()
    groups = parameter_groups(model)
    counts = {
        "steps": trainer.state.global_step,
        "parameters": sum(group.parameters for group in groups),
        "trainable_parameters": sum(group.trainable for group in groups),
        "parameter_groups": [dataclasses.asdict(group) for group in groups],
    }
    if trainer.is_world_process_zero():
        training.save(trainer.model)
    found = {"before": held_out_numbers(before), "after": held_out_numbers(after)}
    return counts | {
        f"{when}_{name}": value
        for when, numbers in found.items()
        for name, value in numbers.items()
    }


def sizes(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Of what `train` returns, what every stage's summary says: steps and parameters."""
    return {name: numbers[name] for name in _SIZES}


def arguments(training: Training, num_processes: int) -> TrainingArguments:
    """TrainingArguments from the stage's section; ``<stage>.trainer`` goes over our defaults.

    Raises:
        ConfigError: an unknown or wrong key in ``<stage>.trainer``.
    """
    settings = training.settings
    accumulate = settings.trainer.get("gradient_accumulation_steps", 1)
    per_process, rest = divmod(settings.batch_size, num_processes * accumulate)
    if rest or not per_process:
        raise ConfigError(
            f"{training.name}.batch_size {settings.batch_size} does not divide by train_workers "
            f"{num_processes} x gradient_accumulation_steps {accumulate}"
        )
    cpu = not torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "per_device_eval_batch_size": per_process,
        # By its lines people see how far it is, also where there are many steps.
        "logging_steps": min(max(1, settings.steps // 200), 50),
        "save_steps": max(1, settings.steps // 10),
        "save_total_limit": 1,
        "use_cpu": cpu,
        "ddp_backend": "gloo" if cpu and torch.distributed.is_initialized() else None,
        "dataloader_pin_memory": not cpu,
        "disable_tqdm": True,
    }
    owned: dict[str, Any] = {
        "output_dir": str(training.checkpoints),
        "max_steps": settings.steps,
        "per_device_train_batch_size": per_process,
        "learning_rate": settings.learning_rate,
        **_schedule(settings),
        **_evaluations(settings),
        "weight_decay": settings.weight_decay,
        "seed": training.config.run.seed,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "steps",
        # Not a call of evaluate() before train(): after that, in several processes, train() would
        # leave the model without DistributedDataParallel, and each process would train alone.
        "eval_on_start": True,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": [],
    }
    if training.autocast:
        owned[training.autocast] = True
    try:
        return TrainingArguments(**{**defaults, **settings.trainer, **owned})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{training.name}.trainer: {error}") from error


def _schedule(settings: SupervisedConfig) -> dict[str, Any]:
    warmup_steps = settings.num_warmup_steps(settings.steps)
    if not settings.final_lr_share:
        return {"lr_scheduler_type": settings.scheduler, "warmup_steps": warmup_steps}
    further = settings.trainer.get("lr_scheduler_kwargs") or {}
    return {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {**further, "min_lr_rate": settings.final_lr_share},
        "warmup_steps": warmup_steps,
    }


def _evaluations(settings: SupervisedConfig) -> dict[str, Any]:
    if settings.eval_every is None:
        return {}
    if settings.eval_every == "epoch":
        return {"eval_strategy": "epoch"}
    return {"eval_strategy": "steps", "eval_steps": settings.eval_every}


def refuse_unknown_arguments(training: Training) -> None:
    """Check the names in ``<stage>.trainer`` before any process is started.

    Raises:
        ConfigError: naming the unknown key and the nearest valid one.
    """
    known = [field.name for field in dataclasses.fields(TrainingArguments)]
    for name in training.settings.trainer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{training.name}.trainer.{name} is not one of transformers.TrainingArguments{hint}"
            )


def last_checkpoint(training: Training) -> Path | None:
    """The newest whole checkpoint; one that a kill cut short has no readable trainer state."""
    return next((path for _, path in sorted(_checkpoints(training), reverse=True)), None)


def steps_done(training: Training) -> int:
    """Steps that an earlier process trained and saved."""
    return max((step for step, _ in _checkpoints(training)), default=0)


def _checkpoints(training: Training) -> list[tuple[int, Path]]:
    found = []
    for folder in training.checkpoints.glob("checkpoint-*"):
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            found.append((int(state["global_step"]), folder))
        except (OSError, ValueError, KeyError):
            continue
    return found


def _require_folder(training: Training) -> None:
    if not training.data.is_dir():
        raise ConfigError(
            f"A training process of the stage {training.name} on {platform.node()} does not "
            f"see {training.data}; run.dir must be on storage that the training nodes share"
        )


def _load(training: Training, split: str) -> Dataset:
    data = load_from_disk(str(training.data / split))
    assert isinstance(data, Dataset)
    return data
