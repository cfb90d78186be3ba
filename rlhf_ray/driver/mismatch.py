"""The log-prob mismatch bound: proof, shard by shard, that the policy is what was sampled from."""

from collections.abc import Sequence

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
        """Refuse a batch with a shard over the bound; calibrate the bound on the first batch."""
        if self.bound is None:
            mean, _ = _mean_mismatch(batch)
            self.bound = min(max(CALIBRATION_FACTOR * mean, self._floor), self._ceiling)
        for scored in batch:
            self._refuse_beyond(self.bound, [scored])
        if not self._is_exact:
            for group in _joined(batch):
                self._refuse_beyond(self.bound, group)

    def _refuse_beyond(self, bound: float, shards: Sequence[ScoredShard]) -> None:
        mean, num_tokens = _mean_mismatch(shards)
        limit = bound if self._is_exact else bound * (1 + OUTLIER / num_tokens)
        if not mean <= limit:  # `not <=` also refuses NaN
            info = shards[0].shard.info
            others = f" and {len(shards) - 1} other short ones" if len(shards) > 1 else ""
            raise WeightSyncError(
                f"Shard {info.index} (version {info.versions[0]}){others}: engine and learner "
                f"differ by {mean:.2g} nats a token, the bound is {limit:.2g} for {num_tokens} "
                "tokens. The generator does not sample from the policy: check adapter, base model "
                "and temperature"
            )


def _mean_mismatch(shards: Sequence[ScoredShard]) -> tuple[float, int]:
    """Return the mean over the tokens of some shards, and their number."""
    num_tokens = sum(scored.mismatch.num_tokens for scored in shards)
    total = sum(scored.mismatch.mean * scored.mismatch.num_tokens for scored in shards)
    return total / num_tokens, num_tokens


def _joined(batch: Sequence[ScoredShard]) -> list[list[ScoredShard]]:
    """Join the shards with few tokens to groups with enough of them, as far as there are any."""
    groups: list[list[ScoredShard]] = []
    for scored in batch:
        if scored.mismatch.num_tokens >= JOINED_TOKENS:
            continue
        if not groups or _mean_mismatch(groups[-1])[1] >= JOINED_TOKENS:
            groups.append([])
        groups[-1].append(scored)
    return groups
