"""The log-prob mismatch bound: whether each shard of a batch was sampled from the policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low

from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import ScoredShard

CALIBRATION_FACTOR = 10.0
FLOOR, CEILING = 1e-4, 0.01
"""Limits of the bound, nats per token, if engine and learner hold equal fp32 weights."""
ROUNDED_FLOOR, ROUNDED_CEILING = 0.02, 0.1
"""Limits of the bound if one of them rounds its weights, or quantises them to int8."""
NF4_CEILING = 0.3
"""Largest bound, and mean error in the proof, of a learner over an nf4 base. Measured on CPU with
the quick start's model: nf4 differs from a bf16 engine by 0.015 nats a token, bf16 from fp32 by
0.003, int8 by 0.002, a temperature of 0.7 by 0.07. It has not been measured on GPUs."""
OUTLIER = 7
"""Bounds by which one token of a shard may exceed the bound, where weights are rounded.

Rounding has heavy tails: the mean of n honest tokens that is far too high is so by one of them, so
the bound widens with 1 / n. Of 200 simulated runs of honest engines 198 broke the bare bound with
shards of a token and 25 with shards of four; none breaks this one."""
JOINED_TOKENS = 32
"""Shards of fewer tokens are checked together as well, where a faulty engine shows all the same."""


@dataclass(frozen=True, slots=True)
class Mismatched:
    """Shards of a batch that are not sampled from the policy."""

    shards: Sequence[ScoredShard]
    """In prompt order."""
    error: WeightSyncError
    """What is wrong with the first of them."""

    @property
    def generators(self) -> set[str]:
        """Names of the generators that sampled them."""
        return {scored.shard.generator for scored in self.shards}


class MismatchGuard:
    """Bounds the mean |engine's - learner's log-prob| of every shard.

    The first batch, sampled right after the proof, calibrates the bound: ten times its mean
    mismatch, at least what rounding can cause, at most what a wrong adapter or temperature would.
    """

    def __init__(
        self, engine_is_exact: bool, bound: float | None = None, ceiling: float | None = None
    ) -> None:
        """
        Args:
            engine_is_exact: whether engine and learner compute with the same fp32 weights on CPUs.
            bound: a bound from the config or an earlier process, nats per token; None: calibrate.
            ceiling: largest calibrated bound; None: by ``engine_is_exact``.
        """
        self._is_exact = engine_is_exact
        self._floor = FLOOR if engine_is_exact else ROUNDED_FLOOR
        self._ceiling = ceiling or (CEILING if engine_is_exact else ROUNDED_CEILING)
        self.bound = bound

    def check(self, batch: Sequence[ScoredShard]) -> None:
        """Refuse a batch with a shard over the bound; calibrate the bound on the first batch.

        Raises:
            WeightSyncError: naming the first such shard.
        """
        if found := self.find(batch):
            raise found.error

    def find(self, batch: Sequence[ScoredShard]) -> Mismatched | None:
        """Return the shards over the bound, if any; calibrate the bound on the first batch."""
        batch = [scored for scored in batch if scored.mismatch.num_tokens]
        if self.bound is None:
            self.bound = self._calibrated(batch)
        groups = [[scored] for scored in batch]
        if not self._is_exact:
            groups += _joined(batch)
        beyond = [group for group in groups if self._is_beyond(self.bound, group)]
        if not beyond:
            return None
        named = {scored.shard.info.index for group in beyond for scored in group}
        shards = [scored for scored in batch if scored.shard.info.index in named]
        return Mismatched(shards, self._error(self.bound, beyond[0]))

    def _calibrated(self, batch: Sequence[ScoredShard]) -> float:
        """Return the bound that a batch sets, without the shards that most others refuse.

        One faulty generator must not raise the bound for the run: so what is beyond the bound that
        the median shard sets, or the median generator, is left out.
        """
        by_generator: dict[str, list[ScoredShard]] = {}
        for scored in batch:
            by_generator.setdefault(scored.shard.generator, []).append(scored)
        usual = min(_median([[scored] for scored in batch]), _median([*by_generator.values()]))
        bound = self._within_limits(usual)
        trusted = [scored for scored in batch if not self._is_beyond(bound, [scored])]
        mean, _ = _mean_mismatch(trusted or batch)
        return self._within_limits(mean)

    def _within_limits(self, mean: float) -> float:
        return min(max(CALIBRATION_FACTOR * mean, self._floor), self._ceiling)

    def _is_beyond(self, bound: float, shards: Sequence[ScoredShard]) -> bool:
        mean, num_tokens = _mean_mismatch(shards)
        return not mean <= self._limit(bound, num_tokens)  # `not <=` also refuses NaN

    def _limit(self, bound: float, num_tokens: int) -> float:
        return bound if self._is_exact else bound * (1 + OUTLIER / num_tokens)

    def _error(self, bound: float, shards: Sequence[ScoredShard]) -> WeightSyncError:
        mean, num_tokens = _mean_mismatch(shards)
        info = shards[0].shard.info
        others = f" and {len(shards) - 1} other short ones" if len(shards) > 1 else ""
        names = " and ".join(sorted({scored.shard.generator for scored in shards} - {""}))
        return WeightSyncError(
            f"Shard {info.index} (version {info.versions[0]}){others}: engine and learner "
            f"differ by {mean:.2g} nats a token, the bound is {self._limit(bound, num_tokens):.2g} "
            f"for {num_tokens} tokens. {names or 'The generator'} did not sample from the policy: "
            "check adapter, base model and temperature"
        )


def _mean_mismatch(shards: Sequence[ScoredShard]) -> tuple[float, int]:
    """Return the mean over the tokens of some shards, and their number."""
    num_tokens = sum(scored.mismatch.num_tokens for scored in shards)
    total = sum(scored.mismatch.mean * scored.mismatch.num_tokens for scored in shards)
    return total / num_tokens, num_tokens


def _median(groups: Sequence[Sequence[ScoredShard]]) -> float:
    """Return the lower median of the groups' mean mismatches; NaN counts as infinite."""
    means = (_mean_mismatch(group)[0] for group in groups)
    return median_low(math.inf if math.isnan(mean) else mean for mean in means)


def _joined(batch: Sequence[ScoredShard]) -> list[list[ScoredShard]]:
    """Join the shards with few tokens to groups with enough of them, as far as there are any.

    Those of one generator are joined first: a faulty one should not be joined with others.
    """
    groups: list[list[ScoredShard]] = []
    for scored in sorted(batch, key=lambda scored: scored.shard.generator):
        if scored.mismatch.num_tokens >= JOINED_TOKENS:
            continue
        if not groups or _mean_mismatch(groups[-1])[1] >= JOINED_TOKENS:
            groups.append([])
        groups[-1].append(scored)
    return groups
