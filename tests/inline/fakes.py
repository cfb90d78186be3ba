"""Roles in a few lines of numpy over the fake engine's one-distribution model; faults on request.

The policy is what the fake engine samples from: one distribution over the vocabulary, moved by one
LoRA module. Its score rises with the share of even tokens, so that it has something to learn.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from actors.policy_learner import compare_shifts
from rlhf_ray.engines.fake import VOCAB_SIZE, adapted_logits
from rlhf_ray.engines.served_adapters import digest, tensors_from_bytes, tensors_to_bytes
from rlhf_ray.types import (
    AdapterUpdate,
    AssembledStats,
    Mismatch,
    ProbeComparison,
    RawScores,
    Rollout,
    SampleRequest,
    ScoredShard,
    Shard,
    StepReport,
)

MODULE = "base_model.model.head"
Events = list[tuple[str, Any]]
"""What happened, in order: (what, detail)."""


class Tokenizer:
    """Decodes a token to its number."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, token_ids))


def adapter(b_V: np.ndarray) -> dict[str, torch.Tensor]:
    """The LoRA module that adds ``b_V`` to the logits."""
    return {
        f"{MODULE}.lora_A.weight": torch.ones(1, 1),
        f"{MODULE}.lora_B.weight": torch.tensor(b_V[:, None], dtype=torch.float32),
    }


def logprobs_of(tensors: dict[str, torch.Tensor], temperature: float = 1.0) -> np.ndarray:
    """[V] log-probs of every next token."""
    logits_V = adapted_logits(tensors) / temperature
    return logits_V - np.log(np.exp(logits_V).sum())


@dataclass
class FakeScorer:
    """Twice the share of even tokens."""

    events: Events = field(default_factory=list)

    async def score(self, shard: Shard) -> RawScores:
        self.events.append(("score", shard.info.index))
        even = (2.0 * float(np.mean(r.response_ids % 2 == 0)) for r in shard.rollouts)
        return {"model": tuple(even)}


class FakeReference:
    """The distribution without an adapter."""

    async def logprobs(self, shard: Shard) -> list[np.ndarray]:
        logprobs_V = logprobs_of({})
        return [logprobs_V[r.response_ids].astype(np.float32) for r in shard.rollouts]


@dataclass
class FakePolicy:
    """Vanilla policy gradient with momentum on the adapter's B.

    Faults: ``gap`` is added to every log-prob that is compared with the engine's from iteration
    ``fault_at`` on, ``loss`` is what iteration ``fault_at`` reports, ``lose`` is the number of
    samples that it does not learn.
    """

    events: Events = field(default_factory=list)
    temperature: float = 1.0
    fault_at: int = 0
    gap: float = 0.0
    loss: float = 0.0
    lose: int = 0
    b_V: np.ndarray = field(default_factory=lambda: np.zeros(VOCAB_SIZE))
    momentum_V: np.ndarray = field(default_factory=lambda: np.zeros(VOCAB_SIZE))
    learnt: int = 0
    """Iterations learnt."""

    def _faulty(self) -> bool:
        return bool(self.fault_at) and self.learnt + 1 >= self.fault_at

    def _log_distribution(self) -> np.ndarray:
        return logprobs_of(adapter(self.b_V), self.temperature)

    async def logprobs(self, shard: Shard) -> tuple[list[np.ndarray], Mismatch]:
        own = [self._log_distribution()[r.response_ids].astype(np.float32) for r in shard.rollouts]
        engine = [r.rollout_logprobs for r in shard.rollouts]
        gaps = np.abs(np.concatenate(own) - np.concatenate(engine), dtype=np.float64)
        gaps += self.gap if self._faulty() else 0.0
        return own, Mismatch(float(gaps.mean()), float(gaps.max()), len(gaps))

    async def sample_kl(self, shard: Shard, ref_logprobs: Any) -> tuple[float, ...]:
        own, _ = await self.logprobs(shard)
        return tuple(float((o - r).sum()) for o, r in zip(own, ref_logprobs, strict=True))

    async def assemble(self, batch: Sequence[ScoredShard], kl_coef: float) -> AssembledStats:
        self.events.append(("assemble", kl_coef))
        self._rollouts, kls = _by_position(batch)
        scores = np.array([score for scored in batch for score in scored.scores])
        lengths = np.array([len(r.response_ids) for r in self._rollouts])
        rewards = scores - kl_coef * kls
        self._advantages = rewards
        return AssembledStats(
            num_samples=len(rewards),
            num_tokens=int(lengths.sum()),
            advantage_total=float((rewards * lengths).sum()),
            advantage_total_sq=float((rewards**2 * lengths).sum()),
            kl_total=float(kls.sum()),
            reward_total=float(rewards.sum()),
            neg_logprob_sum=float(
                -sum(lp.sum(dtype=np.float64) for scored in batch for lp in scored.old_logprobs)
            ),
        )

    async def learn(
        self, advantage_mean: float, advantage_std: float, iteration: int
    ) -> StepReport:
        self.events.append(("learn", [r.position for r in self._rollouts]))
        probs_V = np.exp(self._log_distribution())
        gradient_V = np.zeros(VOCAB_SIZE)
        for rollout, advantage in zip(self._rollouts, self._advantages, strict=True):
            counts_V = np.bincount(rollout.response_ids, minlength=VOCAB_SIZE)
            whitened = (advantage - advantage_mean) / advantage_std
            gradient_V += whitened * (counts_V - len(rollout.response_ids) * probs_V)
        self.momentum_V = 0.5 * self.momentum_V + gradient_V
        faulty = self._faulty()
        self.b_V = np.float32(self.b_V + 0.01 * self.momentum_V).astype(np.float64)
        self.learnt += 1
        metrics = {
            "loss/policy_avg": self.loss if faulty else -1.0,
            "policy/grad_norm": float(np.linalg.norm(gradient_V)),
        }
        learnt = self._rollouts[: len(self._rollouts) - (self.lose if faulty else 0)]
        positions = tuple(rollout.position for rollout in learnt)
        return StepReport(metrics, positions, sum(len(r.response_ids) for r in self._rollouts))

    async def state(self) -> dict[str, bytes]:
        self.events.append(("commit", self.learnt))
        return {
            "learner": np.stack([self.b_V, self.momentum_V]).tobytes(),
            "learnt": str(self.learnt).encode(),
            "adapter_model.safetensors": tensors_to_bytes(adapter(self.b_V)),
            "adapter_config.json": json.dumps({"r": 1}).encode(),
        }

    async def load(self, state: dict[str, bytes]) -> None:
        self.b_V, self.momentum_V = np.frombuffer(state["learner"]).reshape(2, -1).copy()
        self.learnt = int(state["learnt"])

    def _update(self, version: int, b_V: np.ndarray) -> AdapterUpdate:
        tensors = adapter(b_V)
        return AdapterUpdate(version, digest(tensors), {"r": 1}, tensors_to_bytes(tensors))

    async def adapter(self, version: int) -> AdapterUpdate:
        return self._update(version, self.b_V)

    async def zero_adapter(self, version: int) -> AdapterUpdate:
        return self._update(version, np.zeros(VOCAB_SIZE))

    async def probe(self, version: int, canaries: Sequence[SampleRequest]) -> AdapterUpdate:
        # 2.5 N(0, 1) on 32 logits is a KL of a nat and more.
        return self._update(version, 2.5 * np.random.default_rng(0).standard_normal(VOCAB_SIZE))

    async def compare(self, update: AdapterUpdate, shard: Shard) -> ProbeComparison:
        tokens = np.concatenate([r.response_ids for r in shard.rollouts])
        engine = np.concatenate([r.rollout_logprobs for r in shard.rollouts])
        with_it = logprobs_of(tensors_from_bytes(update.tensors), self.temperature)[tokens]
        base = logprobs_of({}, self.temperature)[tokens]
        return compare_shifts(engine, with_it, base)


@dataclass
class FakeCritic:
    """Knows one value, and moves it half-way to the mean score."""

    events: Events = field(default_factory=list)
    value: float = 0.0

    async def values(self, shard: Shard) -> list[np.ndarray]:
        return [np.full(len(r.response_ids), self.value, np.float32) for r in shard.rollouts]

    async def assemble(self, batch: Sequence[ScoredShard], kl_coef: float) -> AssembledStats:
        self._scores = [score for scored in batch for score in scored.scores]
        self._positions = tuple(p for scored in batch for p in scored.shard.info.positions)
        return AssembledStats(len(self._scores), 0, 0.0, 0.0, 0.0, 0.0, 0.0)

    async def learn(
        self, advantage_mean: float, advantage_std: float, iteration: int
    ) -> StepReport:
        loss = 0.5 * float(np.mean((np.array(self._scores) - self.value) ** 2))
        self.value += 0.5 * (float(np.mean(self._scores)) - self.value)
        return StepReport({"loss/value_avg": loss, "val/grad_norm": loss}, self._positions, 1)

    async def state(self) -> dict[str, bytes]:
        return {"value": np.float64(self.value).tobytes()}

    async def load(self, state: dict[str, bytes]) -> None:
        self.value = float(np.frombuffer(state["value"])[0])


def _by_position(batch: Sequence[ScoredShard]) -> tuple[list[Rollout], np.ndarray]:
    rollouts = [rollout for scored in batch for rollout in scored.shard.rollouts]
    kls = [
        (old - ref).sum(dtype=np.float64)
        for scored in batch
        for old, ref in zip(scored.old_logprobs, scored.ref_logprobs, strict=True)
    ]
    return rollouts, np.array(kls)
