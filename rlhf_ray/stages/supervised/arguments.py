"""TrainingArguments of a supervised stage, from its section of the config."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.engines.deepspeed.engine import compile_nothing
from rlhf_ray.errors import ConfigError
from rlhf_ray.stages.supervised.training import Training

Keywords = dict[str, Any]


def arguments(training: Training, num_processes: int) -> TrainingArguments:
    """Build TrainingArguments: our defaults, then ``<stage>.trainer``, then the keys that we own.

    Raises:
        ConfigError: a wrong value in ``<stage>.trainer``, or a batch that does not divide.
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
    defaults: Keywords = {
        "per_device_eval_batch_size": per_process,
        # The progress bar moves with these lines, so long trainings need many of them, too.
        "logging_steps": min(max(1, settings.steps // 200), 50),
        "save_steps": max(1, settings.steps // 10),
        "save_total_limit": 1,
        "use_cpu": cpu,
        "ddp_backend": "gloo" if cpu and torch.distributed.is_initialized() else None,
        "dataloader_pin_memory": not cpu,
        "disable_tqdm": True,
    }
    owned: Keywords = {
        "output_dir": str(training.checkpoints),
        "max_steps": settings.steps,
        "per_device_train_batch_size": per_process,
        "learning_rate": settings.learning_rate,
        **_schedule(settings),
        **_evaluations(settings),
        "weight_decay": settings.weight_decay,
        "seed": training.config.run.seed,
        "gradient_checkpointing": settings.gradient_checkpointing,
        # The reentrant kind needs inputs that require gradients; under a frozen base none do.
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_strategy": "steps",
        # Not a call of evaluate() before train(): after that, in several processes, train() would
        # leave the model without DistributedDataParallel, and each process would train alone.
        "eval_on_start": True,
        # Else the Trainer would log a mean of finite losses in place of the NaN that StepLog seeks.
        "logging_nan_inf_filter": False,
        # `collate` needs columns that no model's forward names.
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": [],
    }
    owned |= _half_precision(training)
    try:
        return _on_one_gpu(TrainingArguments(**{**defaults, **settings.trainer, **owned}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{training.name}.trainer: {error}") from error


def _half_precision(training: Training) -> Keywords:
    """Return how to compute in half precision over fp32 weights, and make DeepSpeed ready for it.

    DeepSpeed's bf16 and fp16 would cast every weight, a reward model's head too; autocast doesn't.
    """
    deepspeed = _deepspeed(training.name, training.settings.trainer)
    if deepspeed is not None:  # it starts with the TrainingArguments
        compile_nothing()
    if training.autocast is None or deepspeed is None:
        return {training.autocast: True} if training.autocast else {}
    autocast = {"enabled": True, "dtype": training.config.model.dtype}
    return {"deepspeed": {**deepspeed, "torch_autocast": autocast}}


def _deepspeed(stage: str, trainer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return DeepSpeed's config in ``<stage>.trainer``, which may be the path of a JSON file."""
    key, given = f"{stage}.trainer.deepspeed", trainer.get("deepspeed")
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{key} {given} cannot be read as JSON: {error}") from error
    if given is None or isinstance(given, Mapping):
        owned = [name for name in ("bf16", "fp16", "torch_autocast") if name in (given or {})]
        if owned:
            raise ConfigError(f"{key} may not contain {', '.join(owned)} (set by model.dtype)")
        return given
    raise ConfigError(f"{key}: expected a mapping or the path of a JSON file, got {given!r}")


def _on_one_gpu(made: TrainingArguments) -> TrainingArguments:
    """Keep one process that sees several GPUs (inline) out of DataParallel.

    That gives each GPU a whole batch: ``batch_size`` would be multiplied.
    """
    made._n_gpu = min(made.n_gpu, 1)
    return made


def _schedule(settings: SupervisedConfig) -> Keywords:
    warmup_steps = settings.num_warmup_steps(settings.steps)
    if not settings.final_lr_share:
        return {"lr_scheduler_type": settings.scheduler, "warmup_steps": warmup_steps}
    further = settings.trainer.get("lr_scheduler_kwargs") or {}
    return {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {**further, "min_lr_rate": settings.final_lr_share},
        "warmup_steps": warmup_steps,
    }


def _evaluations(settings: SupervisedConfig) -> Keywords:
    if settings.eval_every is None:
        return {}
    if settings.eval_every == "epoch":
        return {"eval_strategy": "epoch"}
    return {"eval_strategy": "steps", "eval_steps": settings.eval_every}


def refuse_unknown_arguments(stage: str, trainer: Mapping[str, object]) -> None:
    """Check the names in ``<stage>.trainer`` before any stage or process is started.

    Raises:
        ConfigError: naming the unknown key and the nearest valid one, or DeepSpeed's key that the
            config sets itself.
    """
    known = [field.name for field in fields(TrainingArguments)]
    for name in trainer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{stage}.trainer.{name} is not one of transformers.TrainingArguments{hint}"
            )
    _deepspeed(stage, trainer)
