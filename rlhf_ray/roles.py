"""The five roles as the driver sees them: async, whatever carries them out.

Every method raises ActorFailure when its role dies or misses its deadline.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from rlhf_ray.types import (
    AdapterUpdate,
    AssembledStats,
    Gap,
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


class Generators(Protocol):
    """All generators of a run."""

    @property
    def members(self) -> Sequence[Generator]:
        """Those of now."""
        ...

    def generate(self, requests: Sequence[ShardRequest]) -> AsyncIterator[Shard]:
        """Sample shards on whichever generator is free; yields each as it is done."""
        ...

    def scale_to(self, num: int) -> None:
        """Want so many generators; they join and leave in the background."""
        ...

    def statuses(self) -> list[GeneratorStatus]:
        """How each is."""
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
