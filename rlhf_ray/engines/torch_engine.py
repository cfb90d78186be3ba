"""Plain PyTorch as the training engine of a single process: the inline mode."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from rlhf_ray.engines.adam_state import adam_state, load_adam_state
from rlhf_ray.engines.frozen_weights import move_frozen


class TorchEngine:
    """AdamW over the trainable parameters; rank 0 of 1."""

    rank = 0
    world_size = 1

    def __init__(
        self, module: nn.Module, *, learning_rate: float, epsilon: float, max_grad_norm: float
    ) -> None:
        self.model = self.module = module
        self._trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._max_grad_norm = max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self._trainable.values(), lr=learning_rate, eps=epsilon, weight_decay=0.0
        )

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return next(iter(self._trainable.values())).device

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Within, trainable parameters are whole and may be read and written."""
        yield

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients."""
        loss.backward()

    def step(self) -> float:
        """Clip, step, clear; returns the gradient norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self._trainable.values(), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def discard(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def sleep(self) -> None:
        """Frozen weights wait in main memory."""
        move_frozen(self.module, torch.device("cpu"))

    def wake(self) -> None:
        """Frozen weights return."""
        move_frozen(self.module, self.device)

    def sum_over_ranks(self, value: float) -> float:
        """There is one rank."""
        return value

    def export_state(self) -> dict[str, torch.Tensor]:
        """Weights and moments under parameter names."""
        return adam_state(
            self._trainable,
            weight=lambda param: param.data,
            moment=lambda param, key: self._optimizer.state.get(param, {}).get(key),
            num_steps=self._num_steps(),
        )

    def import_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what export_state gave."""
        self._optimizer.state.clear()  # the state of a beginning has no moments to replace them
        load_adam_state(
            self._trainable,
            state,
            set_weight=lambda param, value: param.data.copy_(value),
            set_moments=self._set_moments,
        )

    def _num_steps(self) -> int:
        return max((int(entry["step"]) for entry in self._optimizer.state.values()), default=0)

    def _set_moments(
        self, param: nn.Parameter, moments: Mapping[str, torch.Tensor], num_steps: int
    ) -> None:
        values = {key: moment.to(param).clone() for key, moment in moments.items()}
        self._optimizer.state[param] = {"step": torch.tensor(float(num_steps)), **values}
