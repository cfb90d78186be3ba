"""A generation engine for tests: a model of one distribution, checked inputs, counted calls.

Tests inject it; the config does not offer it. Its model is so small that a test can work out what
any adapter does: every token is drawn from one distribution over the vocabulary, whatever came
before it, and an adapter moves that distribution's logits (`adapted_logits`).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rlhf_ray.engines.protocols import Sampled
from rlhf_ray.errors import ActorFailure, WeightSyncError
from rlhf_ray.models.adapters import digest, tensors_from_bytes
from rlhf_ray.types import AdapterUpdate, SampleRequest, ServedAdapter

VOCAB_SIZE = 32
STOP_TOKEN = 0


def adapted_logits(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """[V] fp64 logits of every next token: a fixed base plus, per module, B A summed over inputs.

    Args:
        tensors: pairs ``<module>.lora_A.weight`` [r, inputs] and ``<module>.lora_B.weight`` [V, r].
    """
    logits_V = np.sin(np.arange(VOCAB_SIZE, dtype=np.float64))
    for name, a in tensors.items():
        if name.endswith("lora_A.weight"):
            b = tensors[name.replace("lora_A", "lora_B")]
            logits_V = logits_V + (b.double() @ a.double()).sum(1).numpy()
    return logits_V


class FakeEngine:
    """A generation engine without a model.

    Args:
        max_tokens: longest response.
        temperature: of the distribution that is sampled.
        delay_s: how long each call of `sample` takes.
        fail_on_call: the call of `sample` (from 1) that raises ActorFailure; None: none.
    """

    def __init__(
        self,
        *,
        max_tokens: int = 8,
        temperature: float = 1.0,
        delay_s: float = 0.0,
        fail_on_call: int | None = None,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.held: dict[str, torch.Tensor] | None = None
        """The tensors that it applies; what `serve` reads back."""
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._delay_s = delay_s
        self._fail_on_call = fail_on_call
        self._running = False

    async def start(self) -> None:
        """Be ready."""
        self.calls["start"] += 1
        self._running = True

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        """Apply an adapter.

        Raises:
            WeightSyncError: the digest is not that of the tensors.
        """
        started = time.perf_counter()
        self._require_running("serve")
        tensors = tensors_from_bytes(update.tensors)
        if digest(tensors) != update.digest:
            raise WeightSyncError(
                f"Version {update.version} was sent with digest {update.digest}, its tensors have "
                f"{digest(tensors)}"
            )
        self.held = tensors
        return ServedAdapter(
            version=update.version,
            num_modules=sum(name.endswith("lora_A.weight") for name in self.held),
            digest=digest(self.held),
            caches_cleared=True,
            seconds=time.perf_counter() - started,
        )

    async def sample(self, requests: Sequence[SampleRequest]) -> list[Sampled]:
        """Sample one response per request from its own seed.

        Raises:
            ActorFailure: this call was to fail.
            WeightSyncError: no adapter is served.
            ValueError: nothing to sample, or an empty prompt.
        """
        self._require_running("sample")
        call = self.calls["sample"]
        await asyncio.sleep(self._delay_s)
        if call == self._fail_on_call:
            raise ActorFailure(f"The fake engine fails on call {call}, as it was told")
        if self.held is None:
            raise WeightSyncError("The engine was asked to sample before it was given an adapter")
        if not requests:
            raise ValueError("The engine was asked to sample no request")
        empty = [request.position for request in requests if not request.prompt.token_ids]
        if empty:
            raise ValueError(f"The prompts at positions {empty} are empty")
        logprobs_V = _log_softmax(adapted_logits(self.held) / self._temperature)
        return [self._respond(request.seed, logprobs_V) for request in requests]

    def _respond(self, seed: int, logprobs_V: np.ndarray) -> Sampled:
        tokens_T = np.random.default_rng(seed).choice(
            VOCAB_SIZE, size=self._max_tokens, p=np.exp(logprobs_V)
        )
        stops = np.flatnonzero(tokens_T == STOP_TOKEN)
        tokens_T = tokens_T[: stops[0] + 1] if len(stops) else tokens_T
        return Sampled(
            token_ids=tokens_T.astype(np.int64),
            logprobs=logprobs_V[tokens_T].astype(np.float32),
            finish_reason="stop" if len(stops) else "length",
        )

    async def stop(self) -> None:
        """Be ready no more."""
        self.calls["stop"] += 1
        self._running = False

    def _require_running(self, method: str) -> None:
        self.calls[method] += 1
        if not self._running:
            raise RuntimeError(f"The engine's {method} was called before start or after stop")


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted_V = logits_V - logits_V.max()
    return shifted_V - np.log(np.exp(shifted_V).sum())
