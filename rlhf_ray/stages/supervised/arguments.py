"""TrainingArguments of a supervised stage, from its section of the config."""

import difflib
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.engines.deepspeed.zero_training import refuse_unknown_zero, trainer_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.stages.supervised.training import Training

Keywords = dict[str, Any]


def arguments(training: Training, num_processes: int, universal: bool = False) -> TrainingArguments:
    """Build TrainingArguments: our defaults, then ``<stage>.trainer``, then the keys that we own.

    ``universal``: whether what DeepSpeed will load was saved by another number of processes.

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
    owned |= _division(training, universal)
    try:
        return _on_one_gpu(TrainingArguments(**{**defaults, **settings.trainer, **owned}))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{training.name}.trainer: {error}") from error


def _division(training: Training, universal: bool) -> Keywords:
    """Return DeepSpeed's config, if there is a ZeRO stage, and how to compute."""
    if training.zero_stage is None:
        return {training.autocast: True} if training.autocast else {}
    autocast = training.config.model.dtype if training.autocast else None
    further = training.settings.deepspeed
    made = trainer_config(training.zero_stage, further, autocast, universal=universal)
    return {"deepspeed": made}


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


def refuse_unknown_arguments(settings: SupervisedConfig) -> None:
    """Check the names in ``<stage>.trainer`` and ``<stage>.deepspeed.zero``, before a stage starts.

    Raises:
        ConfigError: naming the unknown key (of the trainer also the nearest valid one).
    """
    stage, trainer = settings.section(), settings.trainer
    refuse_unknown_zero(f"{stage}.deepspeed.zero", settings.deepspeed.get("zero", {}))
    known = [field.name for field in fields(TrainingArguments)]
    for name in trainer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"{stage}.trainer.{name} is not one of transformers.TrainingArguments{hint}"
            )
