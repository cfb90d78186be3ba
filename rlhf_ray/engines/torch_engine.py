"""Plain PyTorch as the training engine of one process, and what it shares with DeepSpeed's.

Both engines export the same training state, which is independent of the number of ranks: tensors
under ``weight/<name>``, ``exp_avg/<name>``, ``exp_avg_sq/<name>`` for every trainable parameter,
fp32 on CPU, and ``num_steps``. Before the first step there are no moments.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from rlhf_ray.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's moments, by the names that PyTorch and DeepSpeed give them."""


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
        self._overflows = any(p.dtype == torch.float16 for p in module.parameters())
        self._optimizer = torch.optim.AdamW(
            self._trainable.values(), lr=learning_rate, eps=epsilon, weight_decay=0.0
        )

    @property
    def device(self) -> torch.device:
        """The device that inputs must be on."""
        return next(iter(self._trainable.values())).device

    @contextmanager
    def whole_parameters(self) -> Iterator[None]:
        """Do nothing: without sharding, trainable parameters are always whole."""
        yield

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients; ``last`` matters to sharding engines alone."""
        loss.backward()

    def step(self) -> float | None:
        """Clip, step and clear the gradients; return their norm before clipping.

        None: the gradients overflowed in float16, so no step was taken.
        """
        norm = nn.utils.clip_grad_norm_(self._trainable.values(), self._max_grad_norm)
        if self._overflows and not norm.isfinite():
            return self.discard()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def discard(self) -> None:
        """Drop the gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def sleep(self) -> None:
        """Move the frozen weights to main memory."""
        move_frozen(self.module, torch.device("cpu"))

    def wake(self) -> None:
        """Move the frozen weights back."""
        move_frozen(self.module, self.device)

    def sum_over_ranks(self, value: float) -> float:
        """Return the value: there is one rank."""
        return value

    def export_state(self) -> dict[str, torch.Tensor]:
        """Return weights and moments under parameter names."""
        return adam_state(
            self._trainable,
            weight=lambda param: param.data,
            moment=lambda param, key: self._optimizer.state.get(param, {}).get(key),
            num_steps=self._num_steps(),
        )

    def import_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state from `export_state`."""
        # A state from before the first step has no moments that would overwrite the current ones.
        self._optimizer.state.clear()
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


def adam_state(
    trainable: Mapping[str, nn.Parameter],
    *,
    weight: Callable[[nn.Parameter], torch.Tensor],
    moment: Callable[[nn.Parameter, str], torch.Tensor | None],
    num_steps: int,
) -> dict[str, torch.Tensor]:
    """Collect the training state through an engine's accessors."""
    state = {"num_steps": torch.tensor(num_steps)}
    for name, param in trainable.items():
        state[f"weight/{name}"] = _copy(weight(param), param)
        for key in MOMENTS if num_steps else ():
            value = moment(param, key)
            assert value is not None, f"{name} has no {key} after {num_steps} steps"
            state[f"{key}/{name}"] = _copy(value, param)
    return state


def load_adam_state(
    trainable: Mapping[str, nn.Parameter],
    state: Mapping[str, torch.Tensor],
    *,
    set_weight: Callable[[nn.Parameter, torch.Tensor], object],
    set_moments: Callable[[nn.Parameter, Mapping[str, torch.Tensor], int], object],
) -> None:
    """Restore a training state through an engine's setters.

    Raises:
        CheckpointError: the state belongs to other parameters.
    """
    saved = {name.removeprefix("weight/") for name in state if name.startswith("weight/")}
    if mismatched := sorted(saved ^ set(trainable)):
        raise CheckpointError(
            f"The saved learner has other trainable parameters: {len(mismatched)} differ, for "
            f"example {mismatched[0]}; model and LoRA shape must be those of the run"
        )
    num_steps = int(state["num_steps"])
    for name, param in trainable.items():
        set_weight(param, state[f"weight/{name}"])
        if num_steps:
            set_moments(param, {key: state[f"{key}/{name}"] for key in MOMENTS}, num_steps)


def _copy(value: torch.Tensor, param: nn.Parameter) -> torch.Tensor:
    # Under ZeRO-3 a parameter is an empty shard; DeepSpeed keeps the full shape beside it.
    shape = getattr(param, "ds_shape", param.shape)
    return value.detach().float().cpu().reshape(shape).clone()


def move_frozen(module: nn.Module, device: torch.device) -> None:
    """Move frozen weights to a device, and return unused GPU memory to other processes.

    With LoRA nearly all weights are frozen. Trained weights stay: optimizers hold views of them.
    """
    for param in module.parameters():
        if not param.requires_grad:
            param.data = param.data.to(device)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
