import math

import pytest

from rlhf_ray.driver.guards.mismatch import SamplerGapGuard, refuse_non_finite
from rlhf_ray.errors import DivergenceError, WeightSyncError
from rlhf_ray.types import Gap, ScoredShard, Shard, ShardInfo


def shard(mean: float, num_tokens: int = 10, index: int = 0) -> ScoredShard:
    info = ShardInfo(index, (index,), (num_tokens,), (True,), (3,))
    return ScoredShard(Shard(info, None), (0.0,), None, None, None, Gap(mean, mean, num_tokens))


@pytest.mark.parametrize(
    ("exact", "gaps", "bound"),
    [
        # Ten times the mean over tokens: (10 * 1e-4 + 30 * 2e-4) / 40 = 1.75e-4.
        (True, [(1e-4, 10), (2e-4, 30)], 1.75e-3),
        (True, [(1e-7, 10)], 1e-4),  # no lower than rounding can reach
        (True, [(5e-3, 10)], 0.01),  # no higher than a wrong temperature would
        (False, [(5e-3, 10)], 0.05),
        (False, [(1e-4, 10)], 0.02),
        (False, [(0.05, 10)], 0.1),
    ],
)
def test_the_first_batch_sets_the_bound(
    exact: bool, gaps: list[tuple[float, int]], bound: float
) -> None:
    guard = SamplerGapGuard(exact)
    guard.check([shard(mean, tokens, i) for i, (mean, tokens) in enumerate(gaps)])
    assert guard.bound == pytest.approx(bound, rel=1e-9)
    guard.check([shard(1e-8)])
    assert guard.bound == pytest.approx(bound, rel=1e-9), "later batches do not move it"


def test_a_gap_over_the_bound_is_refused_and_names_the_shard() -> None:
    guard = SamplerGapGuard(True, bound=1e-3)
    guard.check([shard(1e-3)])
    with pytest.raises(WeightSyncError, match=r"Shard 1 \(version 3\).*0\.002 nats.*0\.001"):
        guard.check([shard(1e-4), shard(2e-3, index=1)])
    with pytest.raises(WeightSyncError, match="nan"):
        guard.check([shard(math.nan)])


def test_even_the_first_batch_has_a_ceiling() -> None:
    with pytest.raises(WeightSyncError, match=r"bound is 0\.01"):
        SamplerGapGuard(True).check([shard(0.02)])


@pytest.mark.parametrize("name", ["loss/policy_avg", "loss/value_avg", "policy/grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_loss_or_norm_is_refused(name: str, value: float) -> None:
    with pytest.raises(DivergenceError, match=f"Iteration 7: {name} not finite"):
        refuse_non_finite({name: value, "loss/other": 1.0}, 7)


def test_what_may_be_undefined_passes() -> None:
    # Constant returns have no variance to explain.
    refuse_non_finite({"loss/policy_avg": -0.1, "val/explained_variance": math.nan}, 1)
