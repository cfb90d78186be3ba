"""Publishing adapters, and proving that generators serve them.

A digest of received bytes proves nothing, and a tolerance on log-probs alone misses small faults
in bf16. So a generator that starts or joins must first show, through the decoding that rollouts
use, that a known probe moves it exactly as it moves the learner; and at every publication it
reads back from its engine what is applied.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.driver.batches import sample_requests
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.roles import Generator, Policy, Proof
from rlhf_ray.types import AdapterUpdate, ProbeComparison, Prompt, SampleRequest, ShardRequest

NUM_CANARIES = 4
MIN_SHIFT = 0.5
"""Nats a token by which the probe must move the canaries, ..."""
MIN_SHIFT_IN_ERRORS = 20.0
"""... or this many times what engine and learner differ by anyway: a base that knows nothing cannot
be moved by half a nat."""
SHIFT_TOLERANCE = 0.05
"""Share of the shift by which engine and learner may differ."""
ERROR_TOLERANCE, ROUNDED_ERROR_TOLERANCE = 0.01, 0.1
"""Nats a token between engine and learner: on the same fp32 weights, and where one rounds them."""
PROOF_VERSION = -1
"""Version under which probes go; rollouts never carry it."""


def probe_requests(prompts: Sequence[Prompt], num_tokens: int, seed: int) -> list[SampleRequest]:
    """Long prompts of the run's own text: they fill prefix-cache blocks, which must then go stale.

    Args:
        prompts: prompts of the run.
        num_tokens: length of each canary.
        seed: run seed.
    """
    tokens = (token for _ in itertools.count() for prompt in prompts for token in prompt.token_ids)
    stream = list(itertools.islice(tokens, NUM_CANARIES * num_tokens))
    canaries = [
        Prompt(f"canary-{i}", "", tuple(stream[i * num_tokens : (i + 1) * num_tokens]))
        for i in range(NUM_CANARIES)
    ]
    return sample_requests(canaries, 1, seed, "canary")


@dataclass(frozen=True)
class WeightSync:
    """Knows the policy, and refuses generators that do not sample from it."""

    policy: Policy
    canaries: Sequence[SampleRequest]
    engine_is_exact: bool
    max_gap: float | None = None
    """Nats a token that the config allows between engine and learner; None: as it is exact."""

    async def proof(self) -> Proof:
        """What a generator has to pass before it is used: it applies adapters as the learner does.

        The zero adapter goes first and fills the caches; the probe then finds them.
        """
        zero = await self.policy.zero_adapter(PROOF_VERSION)
        probe = await self.policy.probe(PROOF_VERSION, self.canaries)

        async def prove(generator: Generator) -> None:
            await publish_to(generator, zero)
            at_rest = await self._sample_and_compare(generator, zero)
            self._check_error(generator, at_rest)
            await publish_to(generator, probe)
            comparison = await self._sample_and_compare(generator, probe)
            self._check_shift(generator, comparison, at_rest.error)
            self._check_error(generator, comparison)

        return prove

    async def _sample_and_compare(
        self, generator: Generator, update: AdapterUpdate
    ) -> ProbeComparison:
        request = ShardRequest(index=0, samples=tuple(self.canaries), version=update.version)
        shard = await generator.generate(request)
        return await self.policy.compare(update, shard)

    def _check_shift(
        self, generator: Generator, comparison: ProbeComparison, error_at_rest: float
    ) -> None:
        needed = min(MIN_SHIFT, MIN_SHIFT_IN_ERRORS * error_at_rest)
        difference = abs(comparison.engine_shift - comparison.shift)
        if comparison.shift <= needed or difference > SHIFT_TOLERANCE * comparison.shift:
            raise WeightSyncError(
                f"{generator.name} does not apply the probe adapter: on its samples the learner's "
                f"log-probs move by {comparison.shift:.3f} nats a token, the engine's by "
                f"{comparison.engine_shift:.3f} (more than {needed:.2g} and within "
                f"{SHIFT_TOLERANCE:.0%} of each other are needed)"
            )

    def _check_error(self, generator: Generator, comparison: ProbeComparison) -> None:
        usual = ERROR_TOLERANCE if self.engine_is_exact else ROUNDED_ERROR_TOLERANCE
        tolerance = self.max_gap or usual
        if not comparison.error <= tolerance:
            raise WeightSyncError(
                f"{generator.name} samples from another distribution than the learner's: they "
                f"differ by {comparison.error:.3f} nats a token, {tolerance} is allowed; compare "
                "base model, adapter and temperature. Where only a quantised base makes the "
                "difference, allow it by rollout.max_gap"
            )


async def publish_to(generator: Generator, update: AdapterUpdate) -> None:
    """Send an adapter to one generator, and check what its engine then holds.

    Raises:
        WeightSyncError: it holds something else, or kept its caches.
    """
    served = await generator.publish(update)
    problems = []
    if served.digest != update.digest:
        problems.append(
            f"its engine holds {served.num_modules} modules with digest {served.digest}"
        )
    if served.version != update.version:
        problems.append(f"it reports version {served.version}")
    if not served.caches_cleared:
        problems.append("its prefix cache was not cleared")
    if problems:
        raise WeightSyncError(
            f"{generator.name} does not serve version {update.version} "
            f"(digest {update.digest}): {'; '.join(problems)}"
        )
