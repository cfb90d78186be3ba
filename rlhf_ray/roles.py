"""The roles of a PPO run, as Protocols for both sides.

First the interface that the driver calls, async for every kind of process. A role that dies or
misses its deadline is replaced behind it; each method raises ActorFailure when that has failed too
often. Then, below `Roles`, the methods that a
process of each role offers to the clients of `rlhf_ray.cluster`; pyright checks the actor classes
against them where `stages` wires both.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import (
    AdapterUpdate,
    AssembledStats,
    GeneratorsReport,
    GeneratorStatus,
    Handle,
    Mismatch,
    ProbeComparison,
    RawScores,
    Rollout,
    SampleRequest,
    ScoredShard,
    ServedAdapter,
    Shard,
    ShardInfo,
    ShardRequest,
    StateFiles,
    StepReport,
    TokenRows,
)

DataT = TypeVar("DataT")


class Generator(Protocol):
    """Samples responses with the adapter that it serves."""

    @property
    def name(self) -> str:
        """Name of its actor."""
        ...

    async def generate(self, request: ShardRequest) -> Shard:
        """Sample a shard; refuse when another version than the request's is served."""
        ...

    async def publish(self, update: AdapterUpdate) -> ServedAdapter:
        """Serve an adapter; return what the engine then holds, read back from it."""
        ...


Proof = Callable[[Generator], Awaitable[None]]
"""Raises WeightSyncError if a generator does not apply adapters as the learner does."""


class Generators(Protocol):
    """All generators of a run, whose number may change at any time.

    A generator that joins or restarts passes the proof and serves the latest published adapter
    before its first prompt. One that fails is restarted, and the others sample its unfinished
    shards. ActorFailure means that no generator is left.
    """

    async def prove(self, proof: Proof) -> None:
        """Prove every generator now, and each later one before it is used.

        Raises:
            WeightSyncError: no generator passes.
        """
        ...

    async def publish(self, update: AdapterUpdate, *, beside: bool = False) -> None:
        """Publish an adapter; return when every generator serves it or is out of use.

        With ``beside`` it returns at once; the next call waits for this one.

        Raises:
            WeightSyncError: no generator serves it.
        """
        ...

    def generate(
        self, requests: Sequence[ShardRequest], *, or_newer: bool = False
    ) -> AsyncIterator[Shard]:
        """Sample shards on whichever generator is free; yield each once, as it finishes.

        With ``or_newer`` a shard may be of a newer version than requested, which it then names.
        """
        ...

    def awaited(self) -> AbstractContextManager[None]:
        """Count the time as one in which learners wait for a batch that is generated ahead."""
        ...

    def replace(self, names: Collection[str], why: WeightSyncError) -> None:
        """Replace generators that sampled wrong; before, prove them once more, for the record.

        Raises:
            WeightSyncError: ``why``; the restarts are used up, and no other generator is left.
        """
        ...

    def scale_to(self, num: int) -> None:
        """Set the number of generators; they join and leave in the background."""
        ...

    def statuses(self) -> list[GeneratorStatus]:
        """Return the state of each generator."""
        ...

    def report(self) -> GeneratorsReport:
        """Return the state of all generators together."""
        ...


class RewardScorer(Protocol):
    """Rates responses."""

    async def score(self, shard: Shard) -> RawScores:
        """Return the raw score of each response of a shard from every source."""
        ...


class Reference(Protocol):
    """The frozen model that the policy is held close to."""

    async def logprobs(self, shard: Shard) -> Handle[TokenRows]:
        """Compute the log-probs of the response tokens."""
        ...


class LearnerGroup(Protocol):
    """Ranks that learn together."""

    async def assemble(self, batch: Sequence[ScoredShard], kl_coef: float) -> AssembledStats:
        """Compute token rewards and advantages on each rank's rows; return their sums."""
        ...

    async def learn(
        self, advantage_mean: float, advantage_std: float, iteration: int
    ) -> StepReport:
        """Run all epochs over the assembled batch, with the learning rate of the iteration."""
        ...

    async def state(self) -> Handle[StateFiles]:
        """Export files that `load` accepts at any number of ranks."""
        ...

    async def load(self, state: Handle[StateFiles] | StateFiles) -> None:
        """Restore a state."""
        ...


class Policy(LearnerGroup, Protocol):
    """The policy's learners."""

    async def logprobs(self, shard: Shard) -> tuple[Handle[TokenRows], Mismatch]:
        """Compute the current policy's log-probs of a shard, and the mismatch to the engine's."""
        ...

    async def sample_kl(self, shard: Shard, ref_logprobs: Handle[TokenRows]) -> tuple[float, ...]:
        """Return [N] token sum of k1 between the current policy and the reference, nats."""
        ...

    async def adapter(self, version: int) -> AdapterUpdate:
        """Export the current adapter, to be published."""
        ...

    async def probe(self, version: int, prompts: Sequence[SampleRequest]) -> AdapterUpdate:
        """Make a seeded adapter that moves the prompts' log-probs by over half a nat per token."""
        ...

    async def zero_adapter(self, version: int) -> AdapterUpdate:
        """Make an adapter of the policy's shape that changes nothing."""
        ...

    async def compare(self, update: AdapterUpdate, shard: Shard) -> ProbeComparison:
        """Compare what an engine sampled under an adapter with the learner under that adapter."""
        ...


class Critic(LearnerGroup, Protocol):
    """The critic's learners."""

    async def values(self, shard: Shard) -> Handle[TokenRows]:
        """Compute values of the states in which the response tokens were chosen."""
        ...


class Fetch(Protocol):
    """Brings data to the driver: commits to write, sample texts to show."""

    async def __call__(self, handle: Handle[DataT]) -> DataT:
        """Return the data."""
        ...


@dataclass(frozen=True)
class Roles:
    """Every role that the driver calls."""

    generators: Generators
    scorer: RewardScorer
    reference: Reference
    policy: Policy
    critic: Critic | None
    """None if the advantage estimator needs no values."""
    fetch: Fetch
    num_gpus: Callable[[], float]
    """GPUs that the roles hold now."""
    peak_memory: Callable[[], Awaitable[Mapping[str, int]]]
    """Peak memory of each process, bytes."""

    @property
    def learners(self) -> dict[str, Policy | Critic]:
        """The learner groups by the names under which they are committed; policy first."""
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})


class Process(Protocol):
    """A process of any role; it is started after it is placed."""

    def start(self) -> Awaitable[None] | None: ...


class Sleeper(Protocol):
    """A process that can free its GPU for another group for a while."""

    def sleep(self) -> Awaitable[None] | None: ...
    def wake(self) -> Awaitable[None] | None: ...


class GeneratorProcess(Process, Sleeper, Protocol):
    """A process of `actors.generator.Generator`."""

    def generate(self, request: ShardRequest) -> Awaitable[tuple[list[Rollout], ShardInfo]]: ...
    def publish(self, update: AdapterUpdate, tensors: bytes) -> Awaitable[ServedAdapter]: ...
    def stop(self) -> Awaitable[None]: ...


class ScorerProcess(Process, Protocol):
    """A process of `actors.reward_scorer.RewardScorer`."""

    def score(self, rollouts: Sequence[Rollout]) -> Awaitable[RawScores]: ...


class ReferenceProcess(Process, Protocol):
    """A process of `actors.reference.Reference`."""

    def logprobs(self, rollouts: Sequence[Rollout]) -> tuple[TokenRows, None]: ...


class LearnerProcess(Process, Sleeper, Protocol):
    """A rank of `actors.learner.Learner`."""

    def free_port(self) -> int: ...
    def start(
        self, rank: int = ..., world_size: int = ..., address: str = ..., port: int = ...
    ) -> None: ...
    def assemble(
        self,
        kl_coef: float,
        scores: Sequence[tuple[float, ...]],
        *columns: list[Rollout] | TokenRows | None,
    ) -> AssembledStats: ...
    def learn(self, advantage_mean: float, advantage_std: float, iteration: int) -> StepReport: ...
    def state(self) -> tuple[StateFiles, str]: ...
    def load(self, files: StateFiles) -> None: ...


class PolicyProcess(LearnerProcess, Protocol):
    """A rank of `actors.policy_learner.PolicyLearner`."""

    def logprobs(self, rollouts: Sequence[Rollout]) -> tuple[TokenRows, Mismatch]: ...
    def ref_logprobs(self, rollouts: Sequence[Rollout]) -> tuple[TokenRows, None]: ...
    def sample_kl(
        self, rollouts: Sequence[Rollout], ref_logprobs: TokenRows
    ) -> tuple[float, ...]: ...
    def adapter(self, version: int) -> tuple[bytes, AdapterUpdate]: ...
    def probe(
        self, version: int, prompts: Sequence[SampleRequest]
    ) -> tuple[bytes, AdapterUpdate]: ...
    def zero_adapter(self, version: int) -> tuple[bytes, AdapterUpdate]: ...
    def compare(
        self, update: AdapterUpdate, tensors: bytes, rollouts: Sequence[Rollout]
    ) -> ProbeComparison: ...


class CriticProcess(LearnerProcess, Protocol):
    """A rank of `actors.critic_learner.CriticLearner`."""

    def values(self, rollouts: Sequence[Rollout]) -> tuple[TokenRows, None]: ...
