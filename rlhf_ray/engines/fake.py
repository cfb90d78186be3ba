"""A generation engine for tests: a one-distribution model, checked inputs, counted calls.

Tests inject it; the config does not offer it. Its model is so small that a test can compute the
effect of any adapter: every token is drawn from one distribution over the vocabulary, independent
of the tokens before it, and an adapter shifts that distribution's logits (`adapted_logits`).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.engines.protocols import Sampled
from rlhf_ray.engines.served_adapters import digest, tensors_from_bytes
from rlhf_ray.errors import ActorFailure, WeightSyncError
from rlhf_ray.models.stop_conditions import StopConditions
from rlhf_ray.types import AdapterUpdate, SampleRequest, ServedAdapter

VOCAB_SIZE = 32
STOP_TOKEN = 0
PLAIN_RULE = SamplingRule(stop_token_ids=(STOP_TOKEN,))
SHORT = StopConditions(max_tokens=8)


def decode(token_ids: Sequence[int]) -> str:
    """Return the tokens' ids, separated by spaces."""
    return " ".join(map(str, token_ids))


def adapted_logits(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Return [V] fp64 logits: a fixed base plus, per module, B A summed over its inputs.

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
    """A generation engine without a neural network; its tokens decode to their ids (`decode`).

    Args:
        rule: sampling rule, stop tokens included.
        stop_conditions: length limits and stop strings.
        delay_s: duration of each call of `sample`, seconds.
        fail_on_call: number of the call of `sample` (from 1) that raises ActorFailure; None: none.
    """

    def __init__(
        self,
        *,
        rule: SamplingRule = PLAIN_RULE,
        stop_conditions: StopConditions = SHORT,
        delay_s: float = 0.0,
        fail_on_call: int | None = None,
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.held: dict[str, torch.Tensor] | None = None
        """The adapter tensors that it applies; `serve` reports these."""
        self._rule = rule
        self._stop_conditions = stop_conditions
        self._delay_s = delay_s
        self._fail_on_call = fail_on_call
        self._running = False

    async def start(self) -> None:
        """Accept calls."""
        self.calls["start"] += 1
        self._running = True

    async def serve(self, update: AdapterUpdate) -> ServedAdapter:
        """Apply an adapter."""
        started = time.perf_counter()
        self._require_running("serve")
        tensors = tensors_from_bytes(update.data)
        if digest(tensors) != update.digest:
            raise WeightSyncError(
                f"Version {update.version} was sent with digest {update.digest}, but its tensors "
                f"have {digest(tensors)}"
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
            ActorFailure: this is the call that ``fail_on_call`` names.
            WeightSyncError: no adapter is served.
            ValueError: nothing to sample, or an empty prompt.
        """
        self._require_running("sample")
        call = self.calls["sample"]
        await asyncio.sleep(self._delay_s)
        if call == self._fail_on_call:
            raise ActorFailure(f"The fake engine fails on call {call}, as configured")
        if self.held is None:
            raise WeightSyncError(
                "The engine must serve an adapter before it samples; call serve first"
            )
        if not requests:
            raise ValueError("sample got no requests; pass at least one")
        empty = [request.position for request in requests if not request.prompt.token_ids]
        if empty:
            raise ValueError(f"The prompts at positions {empty} are empty")
        logits_V = torch.from_numpy(adapted_logits(self.held))
        return [self._respond(request.seed, logits_V) for request in requests]

    def _respond(self, seed: int, logits_V: torch.Tensor) -> Sampled:
        rng, limit = np.random.default_rng(seed), self._stop_conditions.limit(seed)
        steps_T = torch.arange(limit)
        logits_TV = self._rule.logits(logits_V.expand(limit, -1), steps_BT=steps_T)
        logprobs_TV = logits_TV.double().log_softmax(-1).numpy()
        tokens: list[int] = []
        reason = None
        while reason is None:
            tokens.append(int(rng.choice(VOCAB_SIZE, p=np.exp(logprobs_TV[len(tokens)]))))
            reason = self._stop_conditions.finish_reason(tokens, limit, self._rule, decode)
        return Sampled(
            token_ids=np.array(tokens, dtype=np.int64),
            logprobs=logprobs_TV[np.arange(len(tokens)), tokens].astype(np.float32),
            finish_reason=reason,
        )

    async def sleep(self) -> None:
        """Drop the adapter, and refuse every call until `wake`."""
        self._require_running("sleep")
        self.held, self._running = None, False

    async def wake(self) -> None:
        """Accept calls again, without an adapter."""
        self.calls["wake"] += 1
        self._running = True

    async def stop(self) -> None:
        """Refuse every further call."""
        self.calls["stop"] += 1
        self._running = False

    def _require_running(self, method: str) -> None:
        self.calls[method] += 1
        if not self._running:
            raise RuntimeError(f"The engine's {method} was called before start or after stop")
