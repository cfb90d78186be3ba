"""What travels between driver and roles: frozen, typed, every field described.

Tensors never pass through the driver; it holds :data:`Handle` objects and scalars. Log-probs are
natural (nats), fp32, of the distribution that rollouts are drawn from
(`algorithms.sampling`): temperature, top-k, top-p, no stop token before its time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Handle = Any
"""A reference to data that lives elsewhere (a Ray object), or the data itself when inline."""

FinishReason = Literal["stop", "length"]

GeneratorState = Literal["starting", "stale", "ready", "suspect", "dead", "restarting", "retired"]
"""starting: its process loads the base; stale: it does not serve the current adapter; ready: it
gets prompts; suspect: it failed or came too late, and is being ended; dead: it is ended;
restarting: it waits to be started anew; retired: nobody wants it, it finishes what it has begun."""

RawScores = Mapping[str, tuple[float | None, ...]]
"""Source -> [N] raw scores of N responses; None where the source has no score for one."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, ready to be continued."""

    id: str
    """Identity within its data set."""
    text: str
    """Rendered prompt: what the token ids decode to, less the start token."""
    token_ids: tuple[int, ...]
    """[P] prompt tokens, without padding."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of its row, for reward functions and evaluation."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One response to be sampled."""

    position: int
    """Place in the batch; decides the seed and the mini-batch, whoever generates it."""
    prompt: Prompt
    """What to continue."""
    seed: int
    """Random seed of this one response, of its limit where that is drawn."""


@dataclass(frozen=True, slots=True)
class ShardRequest:
    """A fixed run of positions of one batch, generated as one piece."""

    index: int
    """Place of the shard in the batch."""
    samples: tuple[SampleRequest, ...]
    """What to generate, in order of position."""
    version: int
    """Adapter version that must be served; any other is refused."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response."""

    position: int
    """Place in the batch."""
    prompt: Prompt
    """What was continued."""
    response_ids: np.ndarray
    """[T] int64 sampled tokens; a stop token, or what completes a stop string, is the last."""
    rollout_logprobs: np.ndarray
    """[T] fp32 log-probs of the sampled tokens by the engine."""
    finish_reason: FinishReason
    """stop: ended by itself, by a stop token or a stop string; length: cut at its limit."""
    version: int
    """Adapter version that sampled it."""
    text: str
    """Decoded response without special tokens; a stop string that ended it is part of it."""

    @property
    def sequence_ids(self) -> np.ndarray:
        """[S] int64: prompt tokens, then response tokens."""
        return np.concatenate(
            [np.asarray(self.prompt.token_ids, dtype=np.int64), self.response_ids]
        )


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """What the driver may know of a shard: scalars only."""

    index: int
    """Place of the shard in the batch."""
    positions: tuple[int, ...]
    """[N] positions of its rollouts."""
    response_lengths: tuple[int, ...]
    """[N] response tokens."""
    stopped: tuple[bool, ...]
    """[N] whether the response ended by itself."""
    versions: tuple[int, ...]
    """[N] adapter version that sampled each."""
    repeating: tuple[bool, ...] = ()
    """[N] whether it repeats a token `repetition.RUN` times or more in a row."""
    distinct_bigrams: tuple[float, ...] = ()
    """[N] share of distinct bigrams within the response."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished shard."""

    info: ShardInfo
    """Its scalars."""
    rollouts: Handle
    """list[Rollout] in order of position."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Difference between what the engine and the learner say of the same tokens of a shard."""

    mean: float
    """Mean |rollout log-prob - old log-prob|, nats a token."""
    largest: float
    """Largest such difference, nats."""
    num_tokens: int
    """Tokens compared."""


@dataclass(frozen=True, slots=True)
class ScoredShard:
    """A shard with everything that learning needs."""

    shard: Shard
    """The rollouts."""
    raw_scores: RawScores
    """Raw score of each response from every source."""
    old_logprobs: Handle
    """list of [T] fp32: the learner's log-probs before the update."""
    ref_logprobs: Handle
    """list of [T] fp32: the frozen reference's log-probs."""
    values: Handle
    """list of [T] fp32: the critic's values."""
    gap: Gap
    """How far engine and learner are apart on it."""
    scores: tuple[float, ...] = ()
    """[N] what is learnt from, once the whole batch is there and its sources are combined."""


@dataclass(frozen=True, slots=True)
class AssembledStats:
    """Sums over the rows that one rank holds; sums of ranks are added by the driver."""

    num_samples: int
    """Rollouts."""
    num_tokens: int
    """Response tokens."""
    advantage_total: float
    """Sum of advantages over tokens, float64."""
    advantage_total_sq: float
    """Sum of squared advantages over tokens, float64."""
    kl_total: float
    """Sum over tokens of k1 against the reference, nats."""
    reward_total: float
    """Sum over tokens of score minus KL penalty."""
    surprise_total: float
    """Sum over tokens of -old log-prob, nats."""

    def __add__(self, other: "AssembledStats") -> "AssembledStats":
        return AssembledStats(
            num_samples=self.num_samples + other.num_samples,
            num_tokens=self.num_tokens + other.num_tokens,
            advantage_total=self.advantage_total + other.advantage_total,
            advantage_total_sq=self.advantage_total_sq + other.advantage_total_sq,
            kl_total=self.kl_total + other.kl_total,
            reward_total=self.reward_total + other.reward_total,
            surprise_total=self.surprise_total + other.surprise_total,
        )


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one group's learning on one iteration came to."""

    metrics: Mapping[str, float]
    """Metric name -> mean over tokens, mini-batches and ranks."""
    samples_learnt: int
    """Rollouts learnt from (each counted once, whatever the number of epochs)."""
    num_tokens: int
    """Response tokens of these rollouts: the weight of the metrics when ranks are merged."""


@dataclass(frozen=True, slots=True)
class AdapterUpdate:
    """A LoRA adapter on its way to the generators."""

    version: int
    """Policy version; grows by one with each iteration."""
    digest: str
    """Identity of its tensors (see models.adapters.digest)."""
    peft_config: Mapping[str, Any]
    """The adapter's PEFT config as plain values."""
    tensors: Handle
    """Safetensors bytes under PEFT's names."""


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """What a generator's engine says it serves, read back from the engine."""

    version: int
    """Version that it was told."""
    num_modules: int
    """Adapter modules that are active."""
    digest: str
    """Digest of the tensors as applied, under PEFT's names."""
    caches_cleared: bool
    """Whether the prefix cache was dropped."""
    seconds: float
    """Time that the change took, pause and resume included."""


@dataclass(frozen=True, slots=True)
class GeneratorStatus:
    """How one generator is."""

    name: str
    """Its actor's name."""
    state: GeneratorState
    """Where it is in its life."""
    version: int | None
    """Adapter version that it serves; None: none that counts."""
    restarts: int
    """How often it was started anew."""


@dataclass(frozen=True, slots=True)
class IdleShares:
    """Who waited for whom between two publications."""

    learners: float
    """Share of the time in which a batch was being generated."""
    generators: float
    """Share of the generators' time in which they had nothing to sample."""
    queue_depth: float
    """Shards that waited for a generator while a batch was being generated: mean over that time."""


@dataclass(frozen=True, slots=True)
class GeneratorsReport:
    """How the generators of a run are."""

    ready: int
    """Generators that get prompts."""
    target: int
    """Generators that are wanted."""
    restarts: int
    """Generators that were started anew, in this process."""
    samples_requeued: int
    """Rollouts that were handed back and sampled again, in this process."""
    idle: IdleShares
    """Up to the last publication, from the one before."""


@dataclass(frozen=True, slots=True)
class ProbeComparison:
    """A shard sampled under a known adapter, compared with the learner; nats a token."""

    shift: float
    """Root mean square of what the adapter adds to the learner's log-prob of each token."""
    engine_shift: float
    """What it adds to the engine's, projected on that: equal where the engine goes along, 0 where
    it stays at the base or moves elsewhere. Unlike a mean, it hides no change behind its sign."""
    error: float
    """Mean |engine's - learner's log-prob with the adapter|."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Everything that an iteration starts from."""

    version: int
    """Adapter version."""
    groups: Mapping[str, Handle]
    """Learner group -> mapping of file name -> bytes: adapter, config, optimizer state."""
    progress: Mapping[str, Any]
    """Plain values: iteration, data cursor, KL coefficient, counts."""
