"""The data that travels between driver and roles: frozen and typed, with every field described.

Tensors never pass through the driver; it holds handles and scalars. Log-probs are natural (nats),
fp32, of the distribution that rollouts are drawn from (`algorithms.logprobs.SamplingRule`):
temperature, top-k, top-p, no stop token before `min_tokens`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from itertools import groupby, pairwise
from typing import Any, Generic, Literal, TypeVar

import numpy as np

DataT_co = TypeVar("DataT_co", covariant=True)


class Handle(Generic[DataT_co]):
    """A reference to data of a type: a Ray object, or the data itself when inline.

    Never instantiated. It has no methods on purpose, so that pyright refuses a driver that looks
    into tensors: `Roles.fetch` brings the data, and a worker's call takes handles as arguments.
    """


TokenRows = list[np.ndarray]
"""A row per response: [T] fp32, a number per response token."""
StateFiles = Mapping[str, bytes]
"""A learner group's state: file name -> content."""

FinishReason = Literal["stop", "length"]
REPETITION = 4
"""Number of identical tokens in a row that counts as repetition."""

GeneratorState = Literal["starting", "stale", "ready", "suspect", "dead", "restarting", "retired"]
"""starting: its process loads the base; stale: it does not serve the current adapter; ready: it
gets prompts; suspect: it failed or missed a deadline, and its process is being ended; dead: its
process is ended; restarting: it waits before its next start; retired: it finishes its shards, then
leaves."""

RawScores = Mapping[str, tuple[float | None, ...]]
"""Source -> [N] raw scores of N responses; None where the source has no score for a response."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, rendered and tokenized."""

    id: str
    """Identity within its dataset."""
    text: str
    """Rendered prompt: what the token ids decode to, without the start token."""
    token_ids: tuple[int, ...]
    """[P] prompt tokens, without padding."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Every other column of its row, for reward functions and evaluation."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One response to be sampled."""

    position: int
    """Index in the batch; decides the seed and the mini-batch, whichever generator samples it."""
    prompt: Prompt
    """Prompt to continue."""
    seed: int
    """Random seed of this response, and of its length limit where that is drawn."""


@dataclass(frozen=True, slots=True)
class ShardRequest:
    """A fixed run of positions of one batch, generated in one call."""

    index: int
    """Index of the shard in the batch."""
    samples: tuple[SampleRequest, ...]
    """Responses to sample, in order of position."""
    version: int
    """Adapter version to sample with; a generator that serves another refuses."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response."""

    position: int
    """Index in the batch."""
    prompt: Prompt
    """Prompt that it continues."""
    response_ids: np.ndarray
    """[T] int64 sampled tokens, including the stop token or the end of the stop string."""
    rollout_logprobs: np.ndarray
    """[T] fp32 log-probs of the sampled tokens, computed by the engine."""
    finish_reason: FinishReason
    """stop: ended with a stop token or a stop string; length: cut at its limit."""
    version: int
    """Adapter version that sampled it."""
    text: str
    """Decoded response without special tokens, including a stop string that ended it."""

    @property
    def sequence_ids(self) -> np.ndarray:
        """Return [S] int64: prompt tokens, then response tokens."""
        return np.concatenate(
            [np.asarray(self.prompt.token_ids, dtype=np.int64), self.response_ids]
        )

    @property
    def repeats_a_token(self) -> bool:
        """Whether the response has the same token `REPETITION` times or more in a row."""
        return any(len(list(run)) >= REPETITION for _, run in groupby(self.response_ids.tolist()))

    @property
    def distinct_bigrams(self) -> float:
        """The share of the response's bigrams that are distinct; 1 if it is too short for any.

        Source: distinct-2, Li et al. 2016 (arXiv:1510.03055), here within one response.
        """
        bigrams = list(pairwise(self.response_ids.tolist()))
        return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """The scalars of a shard, which the driver gets instead of its tensors."""

    index: int
    """Index of the shard in the batch."""
    positions: tuple[int, ...]
    """[N] positions of its rollouts."""
    response_lengths: tuple[int, ...]
    """[N] numbers of response tokens."""
    stopped: tuple[bool, ...]
    """[N] whether the response ended with a stop token or stop string."""
    versions: tuple[int, ...]
    """[N] adapter version that sampled each."""
    repeating: tuple[bool, ...] = ()
    """[N] whether the response repeats a token `REPETITION` times or more in a row."""
    distinct_bigrams: tuple[float, ...] = ()
    """[N] share of distinct bigrams within the response."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A finished shard."""

    info: ShardInfo
    """Scalars of its rollouts."""
    rollouts: Handle[list[Rollout]]
    """The rollouts, in order of position."""
    generator: str = ""
    """Name of the generator that sampled it."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Log-prob mismatch between engine and learner over the tokens of a shard."""

    mean: float
    """Mean |rollout log-prob - old log-prob|, nats per token."""
    largest: float
    """Largest such difference, nats."""
    num_tokens: int
    """Number of tokens compared; 0: none was, because the learners have left its version."""


@dataclass(frozen=True, slots=True)
class ScoredShard:
    """A shard with everything that learning needs."""

    shard: Shard
    """The rollouts."""
    raw_scores: RawScores
    """Raw score of each response from every source."""
    old_logprobs: Handle[TokenRows]
    """The learner's log-probs before the update."""
    ref_logprobs: Handle[TokenRows]
    """The frozen reference's log-probs."""
    values: Handle[TokenRows] | None
    """The critic's values; None without a critic."""
    mismatch: Mismatch
    """Log-prob mismatch between engine and learner."""
    scores: tuple[float, ...] = ()
    """[N] combined scores to learn from; empty until the whole batch has arrived."""


@dataclass(frozen=True, slots=True)
class AssembledStats:
    """Sums over the rows of one rank; the driver adds those of all ranks."""

    num_samples: int
    """Number of rollouts."""
    num_tokens: int
    """Number of response tokens."""
    advantage_total: float
    """Sum of advantages over tokens, float64."""
    advantage_total_sq: float
    """Sum of squared advantages over tokens, float64."""
    kl_total: float
    """Sum over tokens of k1 against the reference, nats."""
    reward_total: float
    """Sum over tokens of score minus KL penalty."""
    neg_logprob_sum: float
    """Sum over tokens of -old log-prob, nats."""

    def __add__(self, other: "AssembledStats") -> "AssembledStats":
        names = [field.name for field in fields(self)]
        return AssembledStats(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True, slots=True)
class StepReport:
    """Outcome of one learner group's updates in one iteration."""

    metrics: Mapping[str, float]
    """Metric name -> value, reduced over mini-batches and ranks as it is registered."""
    positions: tuple[int, ...]
    """Positions of the rollouts learnt from, each once for all epochs."""
    num_tokens: int
    """Tokens that the metrics are means over, of every epoch but of no skipped mini-batch: their
    weight when ranks are merged."""

    @property
    def samples_learnt(self) -> int:
        """Number of rollouts learnt from."""
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class AdapterUpdate:
    """A LoRA adapter on its way to the generators."""

    version: int
    """Policy version; grows by one each iteration."""
    digest: str
    """Identity of its tensors (see engines.served_adapters.digest)."""
    peft_config: Mapping[str, Any]
    """The adapter's PEFT config as plain values."""
    tensors: Handle[bytes] | bytes | None
    """Safetensors bytes under PEFT's names, or a handle to them; None where they travel apart."""

    @property
    def data(self) -> bytes:
        """The safetensors bytes, in a process that has received them."""
        assert isinstance(self.tensors, bytes), f"version {self.version} came without its tensors"
        return self.tensors


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """The adapter that a generator's engine serves, read back from the engine."""

    version: int
    """Version that was sent."""
    num_modules: int
    """Number of active adapter modules."""
    digest: str
    """Digest of the tensors as applied, under PEFT's names."""
    caches_cleared: bool
    """Whether no later sample can read the prefix cache of older weights."""
    seconds: float
    """Time that the change took, including pause and resume."""


@dataclass(frozen=True, slots=True)
class GeneratorStatus:
    """State of one generator, as `rlhf-ray status` shows it."""

    name: str
    """Its actor's name."""
    state: GeneratorState
    """State of its state machine."""
    version: int | None
    """Adapter version that it serves; None while it serves none."""
    restarts: int
    """Number of its restarts."""


@dataclass(frozen=True, slots=True)
class IdleShares:
    """Idle times of learners and generators between two publications."""

    learners: float
    """Share of the time in which learners waited for a batch."""
    generators: float
    """Share of the generators' time in which they had nothing to sample."""
    queue_depth: float
    """Mean number of waiting shards, over the time in which learners waited for a batch."""


@dataclass(frozen=True, slots=True)
class GeneratorsReport:
    """State of all generators of a run."""

    ready: int
    """Number of generators that get prompts."""
    target: int
    """Number of generators that the run should have."""
    restarts: int
    """Number of restarts of generators, counted by this process."""
    samples_requeued: int
    """Number of rollouts requeued after a generator failed or left, counted by this process."""
    idle: IdleShares
    """Idle times between the last two publications."""
    samples_reissued: int = 0
    """Number of rollouts sampled by a second generator because the first was slow, counted by this
    process."""


@dataclass(frozen=True, slots=True)
class ProbeComparison:
    """A shard sampled under a known adapter, compared with the learner; nats per token."""

    shift: float
    """Root mean square of what the adapter adds to the learner's log-prob of each token."""
    engine_shift: float
    """The engine's change, projected on the learner's: equal to `shift` if the engine applies the
    adapter, 0 if it serves the base or another adapter. Unlike in a mean, signs cannot cancel."""
    error: float
    """Mean |engine's - learner's log-prob with the adapter|."""
    largest: float
    """Largest such difference, nats."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The state that an iteration starts from, held by the driver."""

    version: int
    """Adapter version."""
    groups: Mapping[str, Handle[StateFiles]]
    """Learner group -> adapter, config and optimizer state as files."""
    progress: Mapping[str, Any]
    """Plain values: iteration, data cursor, KL coefficient, counts."""
