"""What a policy learner holds against a generator's samples: probe, comparison, gap and KL."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from assembled_batches import as_group, assemble

from actors.policy_learner import PROBE_SHIFT, PolicyLearner, compare_shifts
from rlhf_ray.driver.weight_sync import probe_requests
from rlhf_ray.engines.served_adapters import digest, tensors_from_bytes
from rlhf_ray.models.adapters import adapter_state
from rlhf_ray.types import Prompt, Rollout


class TestProbe:
    @pytest.fixture
    def canaries(self) -> Any:
        prompts = [Prompt(str(i), "", tuple(range(10 + i, 30 + i))) for i in range(4)]
        return probe_requests(prompts, 16, seed=0)

    def test_it_moves_the_canaries_and_gives_the_policy_back(
        self, policy: PolicyLearner, rollouts: list[Rollout], canaries: Any
    ) -> None:
        assemble(policy, policy, rollouts)
        policy.learn(0.0, 1.0)  # a policy that is not zero
        own = adapter_state(policy._engine.module)  # type: ignore[arg-type]
        tensors, update = policy.probe(-1, canaries)
        state = tensors_from_bytes(tensors)
        assert digest(state) == update.digest
        assert update.version == -1
        assert policy._mean_shift(state, canaries) >= PROBE_SHIFT >= 0.5
        assert policy._mean_shift(own, canaries) < 0.5
        self.same(own, policy)

    def test_it_is_the_same_for_a_policy_that_has_learnt(
        self, policy: PolicyLearner, rollouts: list[Rollout], canaries: Any
    ) -> None:
        _, before = policy.probe(-1, canaries)
        assemble(policy, policy, rollouts)
        policy.learn(0.0, 1.0)
        assert policy.probe(-1, canaries)[1].digest == before.digest

    def test_ranks_whose_shifts_differ_make_the_same_probe(
        self, make_learner: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, canaries: Any
    ) -> None:
        """Kernels that are not deterministic may put them on two sides of PROBE_SHIFT."""
        shifts = [iter([0.1, 0.9999, 2.0]), iter([0.1, 1.0002, 2.0])]
        monkeypatch.setattr(
            PolicyLearner, "_mean_shift", lambda learner, *_: next(shifts[learner._engine.rank])
        )
        ranks = [make_learner(PolicyLearner) for _ in shifts]
        one, other = as_group(ranks, lambda learner: learner.probe(-1, canaries)[1].digest)
        assert one == other

    def test_comparing_gives_the_policy_back(
        self, policy: PolicyLearner, rollouts: list[Rollout], canaries: Any
    ) -> None:
        assemble(policy, policy, rollouts)
        policy.learn(0.0, 1.0)
        own = adapter_state(policy._engine.module)  # type: ignore[arg-type]
        tensors, update = policy.probe(-1, canaries)
        comparison = policy.compare(update, tensors, rollouts)
        assert comparison.shift > 0.5
        self.same(own, policy)

    def test_the_zero_adapter_is_the_base(
        self, policy: PolicyLearner, rollouts: list[Rollout], canaries: Any
    ) -> None:
        assemble(policy, policy, rollouts)
        policy.learn(0.0, 1.0)
        tensors, _ = policy.zero_adapter(0)
        assert policy._mean_shift(tensors_from_bytes(tensors), canaries) == pytest.approx(
            0, abs=1e-6
        )

    def same(self, own: dict[str, torch.Tensor], policy: PolicyLearner) -> None:
        now = adapter_state(policy._engine.module)  # type: ignore[arg-type]
        assert all(torch.equal(own[name], now[name]) for name in own)


def test_a_comparison_is_along_the_learners_shift() -> None:
    base = np.zeros(4, np.float32)
    learner = np.array([1.0, -1.0, 2.0, 0.0], np.float32)
    shift = (6 / 4) ** 0.5
    exact = compare_shifts(learner, learner, base)
    assert (exact.shift, exact.engine_shift, exact.error) == pytest.approx((shift, shift, 0))
    half = compare_shifts(learner / 2, learner, base)
    assert half.engine_shift == pytest.approx(shift / 2)
    assert half.error == pytest.approx(0.5)
    assert compare_shifts(base, learner, base).engine_shift == 0
    assert compare_shifts(-learner, learner, base).engine_shift == pytest.approx(-shift)
    assert compare_shifts(base, base, base).shift == 0


def test_the_gap_is_the_engines_distance(policy: PolicyLearner, rollouts: list[Rollout]) -> None:
    own, gap = policy.logprobs(rollouts)
    differences = np.abs(np.concatenate(own) + 5.0)  # the rollouts' log-probs are all -5
    assert gap.mean == pytest.approx(float(differences.mean()), rel=1e-5)
    assert gap.largest == pytest.approx(float(differences.max()), rel=1e-5)
    assert gap.num_tokens == len(differences)


def test_kl_of_a_sample_is_its_token_sum(policy: PolicyLearner, rollouts: list[Rollout]) -> None:
    own, _ = policy.logprobs(rollouts)
    ref = [logprobs - 0.25 for logprobs in own]
    expected = [0.25 * len(row) for row in own]
    assert policy.sample_kl(rollouts, ref) == pytest.approx(expected, rel=1e-3)
