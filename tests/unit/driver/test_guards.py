"""Tests of each guard; measured numbers are from the recipe's tiny proof of improvement."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.config import load, resolve
from rlhf_ray.config.guards import GuardsConfig
from rlhf_ray.driver.guards import (
    GUARDS,
    NF4_CEILING,
    WATCHED,
    Alarm,
    MismatchGuard,
    alarms,
    prompt_reuse,
    refuse_non_finite,
    remembered,
)
from rlhf_ray.errors import DivergenceError, WeightSyncError
from rlhf_ray.types import Mismatch, ScoredShard, Shard, ShardInfo

HEALTHY = {
    "response/repeating_share": 0.01,
    "response/distinct_bigrams": 0.999,
    "objective/kl": 1.5,
    "objective/entropy": 2.0,
    "policy/ratio_exceeded": 0.0,
    "val/ratio_minibatch_max": 1.1,
    "loss/policy_avg": -0.02,
    "policy/grad_norm": 0.2,
    "loss/value_avg": 0.06,
    "val/grad_norm": 0.4,
}
USUAL = {name: [abs(HEALTHY[name])] * 5 for name in WATCHED}


def guards(**sections: dict[str, Any]) -> GuardsConfig:
    return resolve({"guards": sections}).guards


def seen(metrics: dict[str, float], losses: Any = USUAL, **sections: dict[str, Any]) -> list[Alarm]:
    return alarms(guards(**sections), HEALTHY | metrics, losses)


def test_a_healthy_iteration_sets_off_nothing() -> None:
    assert seen({}) == []
    assert seen({}, losses={}) == []


class TestRepetition:
    @pytest.mark.parametrize(
        ("repeating", "distinct", "kl"),
        [(0.98, 0.40, 119.0), (0.48, 0.75, 96.0), (1.0, 0.5, 116.0), (0.0, 0.75, 96.0)],
    )
    def test_it_fires_on_a_gamed_reward(self, repeating: float, distinct: float, kl: float) -> None:
        (alarm,) = seen(
            {
                "response/repeating_share": repeating,
                "response/distinct_bigrams": distinct,
                "objective/kl": kl,
            }
        )
        assert (alarm.guard, alarm.action) == ("repetition", "warn")
        assert alarm.numbers["response/repeating_share"] == repeating
        assert f"{repeating:.0%} of the responses" in alarm.text
        assert f"a KL of {kl:.3g} nats" in alarm.text
        assert "raise ppo.kl_coef" in alarm.text

    @pytest.mark.parametrize(("repeating", "distinct"), [(0.0, 0.999), (0.02, 0.99), (0.2, 0.8)])
    def test_it_is_silent_on_healthy_answers(self, repeating: float, distinct: float) -> None:
        found = {"response/repeating_share": repeating, "response/distinct_bigrams": distinct}
        assert seen(found) == []

    def test_its_bounds_are_the_configs(self) -> None:
        found = {"response/repeating_share": 0.1, "response/distinct_bigrams": 0.9}
        assert seen(found, repetition={"max_repeating_share": 0.05})
        assert seen(found, repetition={"min_distinct_bigrams": 0.95})
        assert not seen({"response/repeating_share": 1.0}, repetition={"action": "off"})


class TestNegativeKl:
    def test_suppressing_the_end_of_a_response_makes_the_kl_negative(self) -> None:
        """ref(EOS) = .1, pi(EOS) = .5, the others in proportion; EOS itself is never drawn."""
        policy, ref = torch.tensor(0.5 / 9).log(), torch.tensor(0.9 / 9).log()
        per_token = float(kl_estimate(policy, ref, "k1"))
        assert per_token == pytest.approx(math.log(0.5 / 0.9), abs=1e-6)
        assert per_token == pytest.approx(-0.5878, abs=1e-4)
        assert seen({"objective/kl": per_token}) == []
        (alarm,) = seen({"objective/kl": 2 * per_token})
        assert (alarm.guard, alarm.action) == ("negative_kl", "warn")
        for cause in ("padding counts as actions", "end-of-sequence token is suppressed or forced"):
            assert cause in alarm.text
        assert "is -1.18 nats a response, below -1" in alarm.text

    def test_its_bound_is_the_configs(self) -> None:
        assert seen({"objective/kl": -0.6}, negative_kl={"min_kl": -0.5, "action": "stop"})
        assert not seen({"objective/kl": -9.0}, negative_kl={"action": "off"})


class TestRatio:
    @pytest.mark.parametrize(
        ("action", "done"),
        [("skip", "moved no weights"), ("stop", "moved no weights"), ("warn", "all the same")],
    )
    def test_it_says_how_many_and_what_became_of_them(self, action: str, done: str) -> None:
        exceeded = {"policy/ratio_exceeded": 2.0, "val/ratio_minibatch_max": 57.3}
        (alarm,) = seen(exceeded, ratio={"action": action})
        assert (alarm.guard, alarm.action) == ("ratio", action)
        assert "exceeds 10: 2, the largest mean 57.3" in alarm.text
        assert done in alarm.text

    def test_a_policy_that_does_not_look_is_fine(self) -> None:
        metrics = {k: v for k, v in HEALTHY.items() if "ratio" not in k}
        assert alarms(guards(ratio={"action": "off"}), metrics, USUAL) == []


class TestLossSpike:
    @pytest.mark.parametrize("name", WATCHED)
    def test_it_fires_above_a_multiple_of_the_median(self, name: str) -> None:
        usual = abs(HEALTHY[name])
        assert seen({name: 9.9 * usual}) == []
        for value in (10.1 * usual, -10.1 * usual):
            (alarm,) = seen({name: value})
            assert (alarm.guard, alarm.action) == ("loss_spike", "warn")
            assert f"{name} of {abs(value):.3g} is 10.1 times its median" in alarm.text
            assert alarm.numbers == {name: value}

    def test_the_median_does_not_mind_one_spike(self) -> None:
        losses = USUAL | {"loss/value_avg": [0.05, 0.06, 600.0, 0.06, 0.07]}
        assert seen({"loss/value_avg": 0.7}, losses)
        assert not seen({"loss/value_avg": 0.5}, losses)

    def test_it_waits_for_a_history(self) -> None:
        losses = {name: values[:4] for name, values in USUAL.items()}
        assert seen({"loss/value_avg": 600.0}, losses) == []

    def test_what_is_not_finite_needs_no_history(self) -> None:
        (alarm,) = seen({"policy/grad_norm": math.nan}, {}, loss_spike={"action": "rollback"})
        assert alarm.action == "rollback"
        assert "policy/grad_norm is not finite" in alarm.text

    def test_what_was_always_zero_cannot_spike(self) -> None:
        assert seen({"loss/value_avg": 1.0}, USUAL | {"loss/value_avg": [0.0] * 5}) == []

    def test_a_run_without_a_critic_is_fine(self) -> None:
        metrics = {k: v for k, v in HEALTHY.items() if k not in ("loss/value_avg", "val/grad_norm")}
        losses = remembered({}, metrics, 20)
        assert losses["loss/policy_avg"] == [0.02]
        assert losses["loss/value_avg"] == []
        assert alarms(guards(), metrics, losses) == []

    def test_the_latest_values_are_remembered(self) -> None:
        losses: Any = {}
        for value in range(1, 8):
            losses = remembered(losses, HEALTHY | {"loss/value_avg": float(-value)}, window=5)
        assert losses["loss/value_avg"] == [3.0, 4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize(("drawn", "warns"), [(800, False), (801, True)])
def test_more_than_one_pass_over_the_prompts_is_told(drawn: int, warns: bool) -> None:
    assert (prompt_reuse(drawn, 800) is not None) is warns
    alarm = prompt_reuse(2000, 800)
    assert alarm is not None
    assert "will draw 2000 prompts from a set of 800: 2.5 epochs" in alarm.text
    assert alarm.guard in GUARDS


@pytest.mark.parametrize("guard", ["repetition", "negative_kl", "ratio", "loss_spike"])
def test_off_may_be_written_without_quotes(guard: str) -> None:
    """YAML reads a bare off as false."""
    config = load(None, [f"guards.{guard}.action=off"])
    assert getattr(config.guards, guard).action == "off"


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


@pytest.mark.parametrize("name", ["loss/policy_avg", "loss/value_avg", "policy/grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_loss_or_norm_is_refused(name: str, value: float) -> None:
    with pytest.raises(DivergenceError, match=f"Iteration 7: {name} not finite"):
        refuse_non_finite({name: value, "loss/other": 1.0}, 7)


def test_what_may_be_undefined_passes() -> None:
    # Constant returns have no variance to explain.
    refuse_non_finite({"loss/policy_avg": -0.1, "val/explained_variance": math.nan}, 1)
