"""Tests of the mismatch bound: which shards count as sampled from the policy."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rlhf_ray.driver.mismatch import NF4_CEILING, MismatchGuard
from rlhf_ray.errors import WeightSyncError
from rlhf_ray.types import Mismatch, ScoredShard, Shard, ShardInfo


def shard(mean: float, num_tokens: int = 10, index: int = 0) -> ScoredShard:
    info = ShardInfo(index, (index,), (num_tokens,), (True,), (3,))
    return ScoredShard(
        Shard(info, None), (0.0,), None, None, None, Mismatch(mean, mean, num_tokens)
    )


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
    guard = MismatchGuard(exact)
    guard.check([shard(mean, tokens, i) for i, (mean, tokens) in enumerate(gaps)])
    assert guard.bound == pytest.approx(bound, rel=1e-9)
    guard.check([shard(1e-8)])
    assert guard.bound == pytest.approx(bound, rel=1e-9), "later batches do not move it"


def test_a_gap_over_the_bound_is_refused_and_names_the_shard() -> None:
    guard = MismatchGuard(True, bound=1e-3)
    guard.check([shard(1e-3)])
    with pytest.raises(WeightSyncError, match=r"Shard 1 \(version 3\).*0\.002 nats.*0\.001"):
        guard.check([shard(1e-4), shard(2e-3, index=1)])
    with pytest.raises(WeightSyncError, match="nan"):
        guard.check([shard(math.nan)])


def test_even_the_first_batch_has_a_ceiling() -> None:
    with pytest.raises(WeightSyncError, match=r"bound is 0\.01"):
        MismatchGuard(True).check([shard(0.02)])


class TestRoundedEngines:
    """In bf16 single tokens differ a lot: seeded simulations of the mean over a shard's tokens."""

    @staticmethod
    def batch(
        generator: np.random.Generator, num_tokens: int, mean: float, spread: float
    ) -> list[ScoredShard]:
        """32 shards whose tokens differ by a lognormal amount of a given mean."""
        shift = np.log(mean) - spread**2 / 2
        tokens = generator.lognormal(shift, spread, (32, num_tokens))
        return [shard(float(row.mean()), num_tokens, i) for i, row in enumerate(tokens)]

    @pytest.mark.parametrize("num_tokens", [1, 2, 4, 8, 16, 64])
    @pytest.mark.parametrize(("mean", "spread"), [(0.01, 1.0), (0.02, 0.8), (0.003, 1.0)])
    def test_honest_runs_pass_whatever_their_shards_hold(
        self, num_tokens: int, mean: float, spread: float
    ) -> None:
        generator, failures = np.random.default_rng(1), 0
        for _ in range(20):
            guard = MismatchGuard(engine_is_exact=False)
            try:
                for _ in range(50):
                    guard.check(self.batch(generator, num_tokens, mean, spread))
            except WeightSyncError:
                failures += 1
        assert failures == 0

    @pytest.mark.parametrize("num_tokens", [1, 2, 4, 8, 16, 64])
    @pytest.mark.parametrize("share", [1.0, 0.5, 0.25], ids=["all", "half", "a quarter"])
    def test_faulty_engines_are_caught_within_a_few_batches(
        self, num_tokens: int, share: float
    ) -> None:
        generator, caught = np.random.default_rng(2), 0
        for _ in range(20):
            guard = MismatchGuard(engine_is_exact=False)
            guard.check(self.batch(generator, num_tokens, 0.01, 0.8))
            try:
                for _ in range(5):
                    honest = self.batch(generator, num_tokens, 0.01, 0.8)
                    faulty = self.batch(generator, num_tokens, 0.4, 1.0)
                    split = int(32 * share)
                    guard.check(faulty[:split] + honest[split:])
            except WeightSyncError:
                caught += 1
        assert caught == 20

    def test_an_nf4_base_may_differ_by_more_than_a_rounded_one(self) -> None:
        honest = self.batch(np.random.default_rng(4), 64, 0.15, 1.0)
        MismatchGuard(False, ceiling=NF4_CEILING).check(honest)
        with pytest.raises(WeightSyncError):
            MismatchGuard(False).check(honest)
        with pytest.raises(WeightSyncError):
            MismatchGuard(False, ceiling=NF4_CEILING).check(
                self.batch(np.random.default_rng(4), 64, 0.5, 1.0)
            )

    def test_a_faulty_engine_is_caught_in_the_first_batch(self) -> None:
        with pytest.raises(WeightSyncError, match="engine and learner differ"):
            MismatchGuard(False).check(self.batch(np.random.default_rng(3), 1, 0.4, 1.0))

    def test_short_shards_are_refused_together_where_each_alone_might_be_honest(self) -> None:
        guard = MismatchGuard(False, bound=0.1)
        guard.check([shard(0.3, 1, i) for i in range(2)])
        with pytest.raises(WeightSyncError, match=r"Shard 0 .* and 31 other short ones.* 32 token"):
            guard.check([shard(0.3, 1, i) for i in range(32)])

    def test_many_tokens_have_the_bare_bound(self) -> None:
        guard = MismatchGuard(False, bound=0.1)
        guard.check([shard(0.1, 10_000)])
        with pytest.raises(WeightSyncError, match=r"by 0\.1 nats .* 10000 tokens"):
            guard.check([shard(0.102, 10_000)])
        with pytest.raises(WeightSyncError, match="nan"):
            guard.check([shard(math.nan, 1)])


def by(name: str, mean: float, num_tokens: int = 64, index: int = 0) -> ScoredShard:
    """A shard that a generator sampled."""
    scored = shard(mean, num_tokens, index)
    return replace(scored, shard=replace(scored.shard, generator=name))


class TestCalibrationWithOneFaultyGenerator:
    @pytest.mark.parametrize("exact", [True, False])
    @pytest.mark.parametrize(
        ("faulty", "honest"),
        [(1, 7), (4, 4), (7, 3)],  # shards: the last, because a generator may be the faster one
    )
    @pytest.mark.parametrize("wrong", [4e-3, 0.5, math.nan, math.inf])
    def test_it_does_not_move_the_bound(
        self, exact: bool, faulty: int, honest: int, wrong: float
    ) -> None:
        usual = 2e-5 if exact else 4e-3
        wrong = wrong if exact else 100 * wrong
        good = [by(f"generator-{1 + i % 2}", usual, index=i) for i in range(honest)]
        bad = [by("generator-0", wrong, index=honest + i) for i in range(faulty)]
        guard, alone = MismatchGuard(exact), MismatchGuard(exact)
        found = guard.find([*bad, *good])
        alone.check(good)
        assert guard.bound == alone.bound == pytest.approx(10 * usual)
        assert found is not None
        assert found.generators == {"generator-0"}
        assert [scored.shard.info.index for scored in found.shards] == [
            honest + i for i in range(faulty)
        ]
        assert "generator-0 did not sample from the policy" in str(found.error)

    def test_a_wrong_shard_of_an_honest_generator_does_not_either(self) -> None:
        guard = MismatchGuard(True)
        found = guard.find([by("a", 2e-5, index=0), by("a", 4e-3, index=1), by("a", 2e-5, index=2)])
        assert guard.bound == pytest.approx(2e-4)
        assert found is not None
        assert [scored.shard.info.index for scored in found.shards] == [1]

    def test_honest_generators_set_the_bound_that_all_their_tokens_do(self) -> None:
        means = [(1e-4, 10), (3e-4, 30), (2e-4, 50), (8e-4, 7)]
        batch = [by(f"g{i % 2}", mean, n, i) for i, (mean, n) in enumerate(means)]
        guard = MismatchGuard(True)
        assert guard.find(batch) is None
        total = sum(mean * n for mean, n in means)
        assert guard.bound == 10 * (total / sum(n for _, n in means))


def test_short_shards_are_joined_by_generator() -> None:
    """Each alone might be honest; together those of one are not, and only it is named."""
    batch = [by(f"g{i % 4}", 0.3 if i % 4 == 2 else 0.01, 1, i) for i in range(128)]
    found = MismatchGuard(False, bound=0.1).find(batch)
    assert found is not None
    assert found.generators == {"g2"}
    assert len(found.shards) == 32
