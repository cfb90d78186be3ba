"""The five roles as the driver sees them: async, whatever carries them out.

Every method raises ActorFailure when its role dies or misses its deadline.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_ray.types import (
    AdapterUpdate,
    AssembledStats,
    Gap,
    GeneratorsReport,
    GeneratorStatus,
    Handle,
    ProbeComparison,
    RawScores,
    SampleRequest,
    ScoredShard,
    ServedAdapter,
    Shard,
    ShardRequest,
    StepReport,
)


class Generator(Protocol):
    """Samples responses with the adapter that it was last given."""

    @property
    def name(self) -> str:
        """Its actor's name."""
        ...

    async def generate(self, request: ShardRequest) -> Shard:
        """Sample a shard; refuses when another version than the request's is served."""
        ...

    async def publish(self, update: AdapterUpdate) -> ServedAdapter:
        """Serve an adapter; returns what the engine then holds, read back from it."""
        ...


Proof = Callable[[Generator], Awaitable[None]]
"""Raises WeightSyncError where a generator does not apply adapters as the learner does."""


class Generators(Protocol):
    """All generators of a run, however many there are at a time.

    Whoever joins, or comes back, passes the proof and serves the adapter that was published last
    before it gets its first prompt; one that fails is started anew, and others do what it did not
    finish. ActorFailure means that none is left.
    """

    async def prove(self, proof: Proof) -> None:
        """Use those that pass, and ask the same of all who join later.

        Raises:
            WeightSyncError: none passes.
        """
        ...

    async def publish(self, update: AdapterUpdate) -> None:
        """Have all serve an adapter; returns when each of now does, or is out.

        Raises:
            WeightSyncError: none does.
        """
        ...

    def generate(self, requests: Sequence[ShardRequest]) -> AsyncIterator[Shard]:
        """Sample shards on whichever generator is free; yields each once, as it is done."""
        ...

    def scale_to(self, num: int) -> None:
        """Want so many generators; they join and leave in the background."""
        ...

    def statuses(self) -> list[GeneratorStatus]:
        """How each is."""
        ...

    def report(self) -> GeneratorsReport:
        """How they are together."""
        ...


class RewardScorer(Protocol):
    """Rates responses."""

    async def score(self, shard: Shard) -> RawScores:
        """Raw score of each response of a shard from every source."""
        ...


class Reference(Protocol):
    """The frozen model that the policy is held close to."""

    async def logprobs(self, shard: Shard) -> Handle:
        """List of [T] log-probs of the response tokens."""
        ...


class LearnerGroup(Protocol):
    """Ranks that learn together."""

    async def assemble(self, batch: Sequence[ScoredShard], kl_coef: float) -> AssembledStats:
        """Token rewards and GAE for the rows of each rank; returns their sums."""
        ...

    async def learn(self, advantage_mean: float, advantage_std: float) -> StepReport:
        """All epochs over the assembled batch."""
        ...

    async def state(self) -> Handle:
        """Mapping of file name -> bytes that `load` takes, at any number of ranks."""
        ...

    async def load(self, state: Handle) -> None:
        """Go back to a state."""
        ...


class Policy(LearnerGroup, Protocol):
    """The policy's learners."""

    async def logprobs(self, shard: Shard) -> tuple[Handle, Gap]:
        """List of [T] log-probs of the response tokens under the current policy, and the gap."""
        ...

    async def sample_kl(self, shard: Shard, ref_logprobs: Handle) -> tuple[float, ...]:
        """[N] token sum of k1 between the current policy and the reference, nats."""
        ...

    async def adapter(self, version: int) -> AdapterUpdate:
        """The current adapter, to be published."""
        ...

    async def probe(self, version: int, canaries: Sequence[SampleRequest]) -> AdapterUpdate:
        """A seeded adapter that moves the canaries' log-probs by more than half a nat a token."""
        ...

    async def zero_adapter(self, version: int) -> AdapterUpdate:
        """An adapter of the policy's shape that changes nothing."""
        ...

    async def compare(self, update: AdapterUpdate, shard: Shard) -> ProbeComparison:
        """Hold what an engine sampled under an adapter against the learner with that adapter."""
        ...


class Critic(LearnerGroup, Protocol):
    """The critic's learners."""

    async def values(self, shard: Shard) -> Handle:
        """List of [T] values at the states in which the response tokens were chosen."""
        ...


@dataclass(frozen=True)
class Roles:
    """Everyone whom the driver talks to."""

    generators: Generators
    scorer: RewardScorer
    reference: Reference
    policy: Policy
    critic: Critic | None
    """None where the advantages need no values."""
    fetch: Callable[[Handle], Awaitable[Any]]
    """Brings data to the driver: commits to be written, sample texts to be shown."""
    num_gpus: Callable[[], float]
    """GPUs that they hold now."""
    peak_memory: Callable[[], Awaitable[Mapping[str, int]]]
    """The most bytes that each of their processes has held."""

    @property
    def learners(self) -> dict[str, Policy | Critic]:
        """The groups that learn, by the names under which they are committed; policy first."""
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic else {})
