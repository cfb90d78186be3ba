"""Publication of adapters, and the proof that generators serve them.

A digest of the received bytes proves nothing: an engine may load an adapter and not apply it. A
tolerance on log-probs alone misses small faults in bf16, where engine and learner differ by more
than an early update changes. So a generator that starts or joins must first show, through the
decode path that rollouts use, that a known probe adapter shifts its log-probs as it shifts the
learner's. At every publication it also reads back from its engine which adapter is applied.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.driver.batches import sample_requests
from rlhf_ray.driver.mismatch import MismatchGuard
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.roles import Generator, Policy, Proof
from rlhf_ray.types import AdapterUpdate, ProbeComparison, Prompt, SampleRequest, ShardRequest

NUM_PROBE_PROMPTS = 4
MIN_SHIFT = 0.5
"""Nats per token by which the probe must move the probe prompts: below, a proof shows nothing."""
MIN_SHIFT_IN_ERRORS = 20.0
"""Smaller shifts also pass if they exceed the usual error between engine and learner this many
times: an untrained base cannot be moved by half a nat."""
SHIFT_TOLERANCE = 0.05
"""Share of the shift by which engine and learner may differ."""
ERROR_TOLERANCE, ROUNDED_ERROR_TOLERANCE = 0.01, 0.1
"""Allowed mean error, nats per token: on equal fp32 weights, and if one side rounds them."""
PROOF_VERSION = -1
"""Version of probe adapters; no rollout has it, so probe samples are never learnt from."""


def probe_requests(prompts: Sequence[Prompt], num_tokens: int, seed: int) -> list[SampleRequest]:
    """Make long prompts from the run's own prompts.

    They must be long: only whole blocks enter the engine's prefix cache, and a stale cache is one
    of the faults that the proof must find.
    """
    tokens = (token for _ in itertools.count() for prompt in prompts for token in prompt.token_ids)
    stream = list(itertools.islice(tokens, NUM_PROBE_PROMPTS * num_tokens))
    probe_prompts = [
        Prompt(f"canary-{i}", "", tuple(stream[i * num_tokens : (i + 1) * num_tokens]))
        for i in range(NUM_PROBE_PROMPTS)
    ]
    return sample_requests(probe_prompts, 1, seed, "canary")


@dataclass(frozen=True)
class WeightSync:
    """Proves that generators apply adapters as the learner does, and refuses those that do not."""

    policy: Policy
    probe_prompts: Sequence[SampleRequest]
    engine_is_exact: bool
    max_gap: float | None = None
    """``rollout.max_gap`` or what an nf4 base needs, nats per token; None: the tolerance for the
    engine's precision."""

    def mismatch_guard(self, bound: float | None) -> MismatchGuard:
        """Return the guard of what is sampled after the proof; ``bound``: None calibrates it."""
        return MismatchGuard(self.engine_is_exact, bound, self.max_gap)

    async def proof(self) -> Proof:
        """Make the proof that a generator applies adapters as the learner does."""
        # The order matters. The zero adapter fills the prefix cache with blocks of the base; if
        # the engine did not drop them, the probe would be sampled from them and move too little.
        zero = await self.policy.zero_adapter(PROOF_VERSION)
        probe = await self.policy.probe(PROOF_VERSION, self.probe_prompts)

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
        request = ShardRequest(index=0, samples=tuple(self.probe_prompts), version=update.version)
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
        if not comparison.error <= tolerance:  # `not <=` also refuses NaN
            raise WeightSyncError(
                f"{generator.name} samples from another distribution than the learner's: they "
                f"differ by {comparison.error:.3f} nats a token, {tolerance} is allowed; compare "
                "base model, adapter and temperature. Where only a quantised base makes the "
                "difference, allow it by rollout.max_gap"
            )


async def publish_to(generator: Generator, update: AdapterUpdate) -> None:
    """Send an adapter to one generator, and check what its engine then holds."""
    served = await generator.publish(update)
    problems: list[str] = []
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
