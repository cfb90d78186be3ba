"""transformers.Trainer whose predictions are numbers of each row, so that means are exact."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from transformers import Trainer


class RowTrainer(Trainer, ABC):
    """A Trainer whose predictions are numbers of each held-out row."""

    @abstractmethod
    def predict_rows(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of a batch, and numbers of its rows, first dimension `B`."""

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, numbers = self.predict_rows(model, self._prepare_inputs(inputs))
        return loss, numbers, torch.zeros_like(numbers)  # the Trainer wants labels; none are read


class RowMeanTrainer(RowTrainer):
    """Its loss is that of `predict_rows`: a mean over the rows of a batch."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        # Let the Trainer average the means of accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        loss, numbers = self.predict_rows(model, inputs)
        return (loss, numbers) if return_outputs else loss
