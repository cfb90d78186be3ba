"""What a role needs of the engine under it."""

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
    """One response as an engine returns it."""

    token_ids: np.ndarray
    """[T] int64, the stop token included."""
    logprobs: np.ndarray
    """[T] fp32 log-probs of the distribution that is drawn from, nats."""
    finish_reason: FinishReason
    """stop or length."""


class GenerationEngine(Protocol):
    """Samples responses; serves one LoRA adapter at a time."""

    async def start(self) -> None:
        """Load the base model."""
        ...

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """Sample one response per request, in the order of the requests."""
        ...

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        """Serve an adapter (``update.tensors`` holds the bytes); read back what is applied."""
        ...

    async def sleep(self) -> None:
        """Leave the GPU to others; nothing is sampled or served until `wake`."""
        ...

    async def wake(self) -> None:
        """Take the GPU again; an adapter must be served anew."""
        ...

    async def stop(self) -> None:
        """Free everything."""
        ...


class TrainingEngine(Protocol):
    """Owns the optimizer of one rank of a learner group."""

    rank: int
    world_size: int
    model: nn.Module
    """What forward passes go through."""
    module: nn.Module
    """The model inside, whose adapter is read and written."""

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        ...

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Within, trainable parameters are whole and may be read and written; all ranks call."""
        ...

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Accumulate gradients; ``last`` marks the final micro-batch of an optimizer step."""
        ...

    def step(self) -> float:
        """Take an optimizer step; returns the gradient norm before clipping."""
        ...

    def discard(self) -> None:
        """Drop the gradients instead of a step; neither weights nor moments move."""
        ...

    def sleep(self) -> None:
        """Leave the GPU to others, as far as what is not trained goes."""
        ...

    def wake(self) -> None:
        """Take the GPU again."""
        ...

    def sum_over_ranks(self, value: float) -> float:
        """The sum of what each rank gives, in float64 and the same on all; every rank calls."""
        ...

    def export_state(self) -> dict[str, torch.Tensor]:
        """Trainable weights (fp32) and Adam moments under parameter names; every rank calls."""
        ...

    def import_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put back what export_state gave, at any number of ranks; every rank calls."""
        ...
