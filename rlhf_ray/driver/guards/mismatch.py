"""What must hold before a batch is learnt, and before what was learnt is committed."""

import math
from collections.abc import Mapping, Sequence

from rlhf_ray.errors import DivergenceError, RlhfError, WeightSyncError
from rlhf_ray.types import ScoredShard, StepReport

CALIBRATION_FACTOR = 10.0
FLOOR, CEILING = 1e-4, 0.01
"""Nats a token between which the bound lies where engine and learner hold equal fp32 weights."""
ROUNDED_FLOOR, ROUNDED_CEILING = 0.02, 0.1
"""The same where one of them rounds or quantises its weights."""


class SamplerGapGuard:
    """Bounds |engine's - learner's log-prob| of every shard.

    The first batch, sampled right after the proof of service, sets the bound: ten times its mean
    gap, no lower than rounding can reach, no higher than a wrong adapter or temperature would.
    """

    def __init__(self, engine_is_exact: bool, bound: float | None = None) -> None:
        """Args: `Config.engine_is_exact`; a bound that is set already, nats a token."""
        self._floor = FLOOR if engine_is_exact else ROUNDED_FLOOR
        self._ceiling = CEILING if engine_is_exact else ROUNDED_CEILING
        self.bound = bound

    def check(self, batch: Sequence[ScoredShard]) -> None:
        """Pass or refuse a batch.

        Raises:
            WeightSyncError: a shard was sampled by something else than the learner's policy.
        """
        if self.bound is None:
            tokens = sum(shard.gap.num_tokens for shard in batch)
            mean = sum(shard.gap.mean * shard.gap.num_tokens for shard in batch) / tokens
            self.bound = min(max(CALIBRATION_FACTOR * mean, self._floor), self._ceiling)
        for scored in batch:
            if not scored.gap.mean <= self.bound:
                info = scored.shard.info
                raise WeightSyncError(
                    f"Shard {info.index} (version {info.versions[0]}): engine and learner differ "
                    f"by {scored.gap.mean:.2g} nats a token, the bound is {self.bound:.2g}. The "
                    "generator does not sample from the policy: wrong adapter, base or temperature"
                )


def refuse_non_finite(metrics: Mapping[str, float], iteration: int) -> None:
    """Stop before a broken state is committed.

    Raises:
        DivergenceError: a loss or gradient norm is NaN or infinite.
    """
    broken = [
        name
        for name, value in metrics.items()
        if name.startswith("loss/") or name.endswith("/grad_norm")
        if not math.isfinite(value)
    ]
    if broken:
        raise DivergenceError(
            f"Iteration {iteration}: {', '.join(broken)} not finite. The last commit is whole; "
            "lower ppo.learning_rate or critic.learning_rate, or raise ppo.kl_coef, and go on"
        )


def num_rollouts(batch: Sequence[ScoredShard]) -> int:
    """Samples of a batch."""
    return sum(len(scored.shard.info.positions) for scored in batch)


def require_whole(batch: Sequence[ScoredShard], batch_size: int, version: int) -> None:
    """A sample is never lost or learnt twice, and each is of the current policy.

    Raises:
        RlhfError: a sample is missing, there twice, or of another version.
    """
    positions = sorted(position for scored in batch for position in scored.shard.info.positions)
    if positions != list(range(batch_size)):
        raise RlhfError(
            f"The batch holds {len(positions)} samples ({len(set(positions))} distinct) where "
            f"{batch_size} were asked for: a shard was lost or came twice"
        )
    stale = {v for scored in batch for v in scored.shard.info.versions} - {version}
    if stale:
        raise RlhfError(
            f"The batch holds samples of versions {sorted(stale)}, {version} is current"
        )


def require_all_learnt(report: StepReport, num_samples: int) -> None:
    """Every sample is learnt once.

    Raises:
        RlhfError: a group learnt fewer, or more.
    """
    if report.samples_learnt != num_samples:
        raise RlhfError(
            f"A learner group learnt {report.samples_learnt} of the {num_samples} samples that "
            "were generated: its ranks did not share the batch out once"
        )
