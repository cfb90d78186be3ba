"""What a supervised stage writes while it trains: a line a step, a line an evaluation."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rlhf_ray.config.supervised import SupervisedConfig
from rlhf_ray.errors import DivergenceError
from rlhf_ray.observability.sinks import JsonlSink

TOKEN_LOSS = "token_loss"
"""Name under which `Training.metrics` gives a loss that is a mean over tokens, not over rows."""

HELD_OUT_METRICS = (TOKEN_LOSS, "perplexity", "accuracy", "auc", "correlation")
"""What `Training.metrics` may give besides the loss of a held-out row."""


class StepLog(TrainerCallback):
    """Writes ``{step, loss, learning_rate, grad_norm}`` lines, and stops on a loss gone wrong.

    With ``<stage>.eval_every`` also ``{step, eval_loss, ...}`` lines, in a file of their own.
    """

    def __init__(
        self, name: str, settings: SupervisedConfig, metrics: Path, evaluations: Path
    ) -> None:
        """
        Args:
            name: the stage, for messages.
            settings: its section of the config.
            metrics: file of the steps.
            evaluations: file of the evaluations.
        """
        self._name = name
        self._settings = settings
        self._sink = JsonlSink(metrics, step_key="step")
        self._evaluations = JsonlSink(evaluations, step_key="step")
        self._is_new = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A training that goes on is evaluated at once, as it was when its checkpoint was saved.
        self._is_new = state.global_step == 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._is_new = True
        if state.global_step >= state.max_steps:
            control.should_save = False  # the stage's result follows at once

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        if logs is not None and "eval_loss" in logs:
            self._log_evaluation(state, logs)
        if logs is None or "loss" not in logs:
            return
        values = {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm")}
        if state.is_world_process_zero:
            self._sink.log(state.global_step, values)
        if not math.isfinite(values["loss"]):
            name = self._name
            raise DivergenceError(
                f"{name}: the loss of step {state.global_step} is {values['loss']}; lower "
                f"{name}.learning_rate {self._settings.learning_rate:g} or add "
                f"{name}.warmup_steps"
            )

    def _log_evaluation(self, state: Any, logs: Mapping[str, Any]) -> None:
        if self._settings.eval_every is None or not self._is_new:
            return
        if state.is_world_process_zero:
            numbers = held_out_numbers(logs).items()
            self._evaluations.log(state.global_step, {f"eval_{n}": value for n, value in numbers})

    def close(self) -> None:
        """Close the files."""
        self._sink.close()
        self._evaluations.close()


def held_out_numbers(evaluation: Mapping[str, float]) -> dict[str, float]:
    """What an evaluation found: `loss`, a mean over tokens where that is known, and others."""
    found = {name: evaluation.get(f"eval_{name}") for name in ("loss", *HELD_OUT_METRICS)}
    known = {name: value for name, value in found.items() if value is not None}
    return known | {"loss": known.pop(TOKEN_LOSS, known["loss"])}
