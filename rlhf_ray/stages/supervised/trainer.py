"""Run transformers.Trainer on a stage's `Training`, in each of its training processes.

The same function runs in Ray Train's workers and, inline, in the driver's own process.
"""

import math
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf_ray.engines.deepspeed.engine import import_deepspeed
from rlhf_ray.engines.deepspeed.zero_training import (
    divided_loading,
    ready_checkpoint,
    separate_steps,
    whole_weights,
)
from rlhf_ray.errors import ConfigError, DivergenceError
from rlhf_ray.models.trainable import ParameterGroup, parameter_groups
from rlhf_ray.observability.phases import count, report
from rlhf_ray.observability.sinks import JsonlSink
from rlhf_ray.stages.supervised.arguments import arguments
from rlhf_ray.stages.supervised.training import (
    HELD_OUT,
    HELD_OUT_LOSS,
    HELD_OUT_METRICS,
    TRAIN,
    Training,
)


@dataclass(frozen=True)
class Trained:
    """Results of a finished training."""

    steps: int
    groups: list[ParameterGroup]
    before: dict[str, float]
    """``loss`` on the held-out rows (a mean over tokens for language models), and what
    `Training.measure` gives, before the first step."""
    after: dict[str, float]
    """The same after the last step."""

    def sizes(self) -> dict[str, object]:
        """Return what every stage's summary has: steps and parameters."""
        return {
            "steps": self.steps,
            "parameters": sum(group.parameters for group in self.groups),
            "trainable_parameters": sum(group.trainable for group in self.groups),
            "parameter_groups": [asdict(group) for group in self.groups],
        }


def train(
    training: Training, num_processes: int, is_interrupted: Callable[[], bool] = lambda: False
) -> Trained | None:
    """Train one stage in this process, as one of ``num_processes`` that all call this.

    Resumes from the last checkpoint in ``training.checkpoints``, if there is one.

    Returns:
        None where it was interrupted, in any of the processes: it has ended with a checkpoint.

    Raises:
        ConfigError: the stage's folder is not visible here, or a TrainingArguments value is wrong.
        DivergenceError: the loss is not finite.
    """
    if not training.data.is_dir():
        raise ConfigError(
            f"A training process of the stage {training.name} on {platform.node()} does not "
            f"see {training.data}; run.dir must be on storage that the training nodes share"
        )
    transformers.set_seed(training.config.run.seed)
    _, checkpoint = training.last_checkpoint()
    zero_stage = training.zero_stage
    if zero_stage is not None:
        import_deepspeed(num_processes)
    universal = ready_checkpoint(checkpoint, zero_stage, num_processes)
    report("loading the model")
    # An adapter's base stays whole here: it has the data type of half precision, and its engine
    # divides it.
    with (
        divided_loading(zero_stage or 0, training.settings.deepspeed)
        if training.all_weights
        else nullcontext()
    ):
        model = training.load_model()
    with closing(StepLog(training, is_interrupted)) as step_log:
        made = arguments(training, num_processes, universal=universal)
        trainer = StageTrainer(training, model, made, step_log)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < trainer.state.max_steps:
            return None
        evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
        is_done = evaluations[-1]["step"] == trainer.state.global_step
        before, after = evaluations[0], evaluations[-1] if is_done else trainer.evaluate()
    groups = parameter_groups(model)
    report("saving the model")
    whole = trainer.whole_model()
    if whole is not None:
        training.save(whole)
    steps = trainer.state.global_step
    return Trained(steps, groups, held_out_numbers(before), held_out_numbers(after))


class StageTrainer(Trainer):
    """A Trainer whose predictions are numbers of each held-out row.

    Means over them are exact; means of batch means would depend on how rows are dealt out to
    batches and processes.
    """

    def __init__(
        self, training: Training, model: nn.Module, made: TrainingArguments, step_log: "StepLog"
    ) -> None:
        def measure(prediction: EvalPrediction) -> dict[str, float]:
            assert isinstance(prediction.predictions, np.ndarray)
            return training.measure(prediction.predictions)

        super().__init__(
            model=model,
            args=made,
            train_dataset=training.load_data(TRAIN),
            eval_dataset=training.load_data(HELD_OUT),
            data_collator=training.collate,
            compute_metrics=measure,
            callbacks=[step_log],
        )
        self.remove_callback(PrinterCallback)
        self._training = training
        if not training.model_computes_loss:
            # Let the Trainer average the means of accumulated batches.
            self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        count(_num_rows(inputs), "rows learnt")
        if self._training.model_computes_loss:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        num_rows = _num_rows(inputs)
        loss, numbers = self._training.predict_rows(model, inputs)
        # The Trainer divides by the number of accumulated batches, but the last one of a pass may
        # be smaller: its rows must not count for more.
        mean_rows = self._step_rows / self.current_gradient_accumulation_steps
        if num_rows != mean_rows:
            loss = loss * (num_rows / mean_rows)
        return (loss, numbers) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step_rows = sum(map(_num_rows, batches))
        return batches, num_items

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad(), computing(self._training, self.args.device):
            loss, numbers = self._training.predict_rows(model, self._prepare_inputs(inputs))
        count(_num_rows(inputs), "rows predicted")
        # The Trainer calls compute_metrics only where it has labels; ours reads none.
        return loss, numbers, torch.zeros_like(numbers)

    def whole_model(self) -> nn.Module | None:
        """Return the model with all of its weights: in the first process; None in others.

        At ZeRO stage 3 it is loaded once more there, and gets the weights that were trained, after
        which this trainer's own are of no use.
        """
        if self._training.zero_stage != 3:
            return self.model if self.is_world_process_zero() else None
        is_adapted = isinstance(self.model, PeftModel)
        weights = whole_weights(self.deepspeed, trained_alone=is_adapted)
        if weights is None:
            return None
        unset_hf_deepspeed_config()  # else what is loaded from here on would be divided
        model = self._training.load_model()
        found = model.load_state_dict(weights, strict=not is_adapted)
        assert not found.unexpected_keys, found
        return model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save nothing for a checkpoint of DeepSpeed, whose own files hold the weights."""
        if self._training.zero_stage is None:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, *args: Any, **named: Any) -> None:
        report("saving a checkpoint")
        super()._save_checkpoint(*args, **named)
        report("")

    def _save_rng_state(self, output_dir: str) -> None:
        """Save each process's random state before the checkpoint counts as whole."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load both, and apply the config's schedule and decay, which may have changed since."""
        super()._load_optimizer_and_scheduler(checkpoint)
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        if checkpoint is None or optimizer is None or scheduler is None:
            return
        if self._training.zero_stage is not None:
            separate_steps(optimizer.optimizer)
        new = self.args.learning_rate
        shares = getattr(scheduler, "lr_lambdas", None)  # DeepSpeed's own schedulers have none
        for index, group in enumerate(optimizer.param_groups):
            # The Trainer makes two groups, and the weights of the first decay.
            group["weight_decay"] = 0.0 if index else self.args.weight_decay
            if initial := group.get("initial_lr"):
                share = shares[index](scheduler.last_epoch) if shares else group["lr"] / initial
                group["lr"], group["initial_lr"] = new * share, new
        scheduler.base_lrs = [new] * len(optimizer.param_groups)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what is logged


def computing(training: Training, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a pass in half precision over fp32 weights.

    The Trainer's own is part of a model that DistributedDataParallel trains, but DeepSpeed's one is
    of its engine, which evaluations go past.
    """
    dtype = getattr(torch, training.config.model.dtype)
    return torch.autocast(device.type, dtype) if training.autocast else nullcontext()


def _num_rows(batch: Mapping[str, Tensor]) -> int:
    return len(next(iter(batch.values())))


class StepLog(TrainerCallback):
    """Writes ``{step, loss, learning_rate, grad_norm}`` lines, and stops at a loss not finite.

    With ``<stage>.eval_every`` also ``{step, eval_loss, ...}`` lines, in a file of their own. An
    interrupted training ends after its step, with a checkpoint.
    """

    def __init__(self, training: Training, is_interrupted: Callable[[], bool]) -> None:
        self._training = training
        self._is_interrupted = is_interrupted
        self._steps = JsonlSink(training.metrics_file, step_key="step")
        self._evaluations = JsonlSink(training.evaluations_file, step_key="step")
        self._is_new = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: object,
    ) -> None:
        with computing(self._training, args.device):
            self._training.ready(model)
        # A resumed training is evaluated at once, as it was when its checkpoint was saved.
        self._is_new = state.global_step == 0
        report("")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._is_new = True
        if state.global_step >= state.max_steps:
            control.should_save = False  # the stage's result follows at once
        elif _on_any_rank(self._is_interrupted(), args.device):
            control.should_save = control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        logs = logs or {}
        name, settings = self._training.name, self._training.settings
        if "eval_loss" in logs and self._is_new and settings.eval_every is not None:
            numbers = held_out_numbers(logs).items()
            self._write(self._evaluations, state, {f"eval_{key}": value for key, value in numbers})
        if "loss" not in logs:
            return
        values = {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm")}
        self._write(self._steps, state, values)
        if not math.isfinite(values["loss"]):
            raise DivergenceError(
                f"{name}: the loss of step {state.global_step} is {values['loss']}; lower "
                f"{name}.learning_rate {settings.learning_rate:g} and resume, or begin a new run "
                f"(run.resume=never) with more {name}.warmup_steps"
            )

    def _write(self, sink: JsonlSink, state: TrainerState, values: Mapping[str, float]) -> None:
        if state.is_world_process_zero:
            sink.log(state.global_step, values)

    def close(self) -> None:
        """Close the files."""
        self._steps.close()
        self._evaluations.close()


def _on_any_rank(flag: bool, device: torch.device) -> bool:
    """Agree on a flag: a rank that trained on alone would wait for the others for ever."""
    if not torch.distributed.is_initialized():
        return flag
    agreed = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
    return bool(agreed)


def held_out_numbers(evaluation: Mapping[str, float]) -> dict[str, float]:
    """Return an evaluation's ``loss`` (a mean over tokens for language models) and metrics."""
    numbers = {
        name: evaluation[f"eval_{name}"]
        for name in HELD_OUT_METRICS
        if evaluation.get(f"eval_{name}") is not None
    }
    return {"loss": numbers.pop(HELD_OUT_LOSS), **numbers}
