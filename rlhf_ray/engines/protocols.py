"""The interfaces of generation and training engines, as actors use them."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from rlhf_ray.types import AdapterUpdate, FinishReason, SampleRequest, ServedAdapter


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled response."""

    token_ids: np.ndarray
    """[T] int64, the stop token included."""
    logprobs: np.ndarray
    """[T] fp32 log-probs in the distribution that the engine samples from, nats."""
    finish_reason: FinishReason
    """stop or length."""


class GenerationEngine(Protocol):
    """Samples responses with the LoRA adapter that was served last."""

    async def start(self) -> None:
        """Load the base model."""
        ...

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """Sample one response per request, in the order of the requests."""
        ...

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        """Serve an adapter (``update.data`` holds bytes); report what the engine applies."""
        ...

    async def sleep(self) -> None:
        """Free GPU memory for other roles; nothing is sampled or served until `wake`."""
        ...

    async def wake(self) -> None:
        """Reload into GPU memory; an adapter must be served again before sampling."""
        ...

    async def stop(self) -> None:
        """Free all resources."""
        ...


class TrainingEngine(Protocol):
    """The model and optimizer of one rank of a learner group."""

    rank: int
    world_size: int
    model: nn.Module
    """Runs forward passes; may be a wrapper."""
    module: nn.Module
    """The model inside the wrapper; its adapter is read and written."""

    @property
    def device(self) -> torch.device:
        """The device that inputs must be on."""
        ...

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Gather trainable parameters while they are read or written; all ranks must enter."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients; ``last`` marks the last micro-batch of an optimizer step."""
        ...

    def step(self) -> float | None:
        """Take an optimizer step; return the gradient norm before clipping.

        None: no step was taken, because the gradients overflowed in float16.
        """
        ...

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of the steps that follow."""
        ...

    def discard(self) -> None:
        """Drop the gradients without a step; weights and moments stay the same."""
        ...

    def sleep(self) -> None:
        """Move frozen weights out of GPU memory, for other roles to use it."""
        ...

    def wake(self) -> None:
        """Move frozen weights back into GPU memory."""
        ...

    def sum_over_ranks(self, value: float) -> float:
        """Return the sum of all ranks' values in float64; every rank must call."""
        ...

    def export_state(self) -> dict[str, torch.Tensor]:
        """Return trainable weights (fp32) and Adam moments by parameter name; all ranks call."""
        ...

    def import_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore a state from `export_state`, of any number of ranks; every rank must call."""
        ...
