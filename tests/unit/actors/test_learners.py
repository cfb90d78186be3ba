"""Tests of policy and critic learners in one process: steps, and the split of rows over ranks."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from assembled_batches import SCORES, assemble, columns, learnt_state

from actors.critic_learner import CriticLearner
from actors.policy_learner import PolicyLearner
from actors.reference import Reference
from rlhf_ray.algorithms.micro_batches import PASS_TOKENS
from rlhf_ray.types import Rollout


class TestSharing:
    """Tests of the split over two ranks, without processes."""

    LENGTHS = (25, 10, 24, 5, 10, 10, 10, 10)
    RESPONSES = (3, 1, 1, 1, 2, 2, 4, 4)

    def plan(self, policy: PolicyLearner, rank: int, world_size: int) -> PolicyLearner:
        cpu = torch.device("cpu")
        policy._engine = SimpleNamespace(rank=rank, world_size=world_size, device=cpu)  # type: ignore[assignment]
        policy._plan_mini_batches(list(self.LENGTHS), list(self.RESPONSES))
        return policy

    @pytest.fixture
    def unstarted(self, make_config: Callable[..., Any], base: str) -> PolicyLearner:
        return PolicyLearner(
            "policy-0",
            make_config(ppo={"max_tokens_per_micro_batch": 48}),
            base,
            "torch",
        )

    def test_ranks_share_the_tokens_of_a_mini_batch(self, unstarted: PolicyLearner) -> None:
        first = self.plan(unstarted, 0, 2)
        assert first._my_rows == [[0, 3], [4, 6]]  # 30 tokens, and 20
        second = self.plan(unstarted, 1, 2)
        assert second._my_rows == [[1, 2], [5, 7]]  # 34 tokens, and 20
        # The denominator is of the whole mini-batch, whichever rank holds its rows.
        assert first._mini_batch_tokens == second._mini_batch_tokens == [6, 12]

    def test_ranks_take_the_same_number_of_micro_batches(self, unstarted: PolicyLearner) -> None:
        # Rank 0 holds rows of 25 and 5 tokens: 2 * 25 > 48, so two; rank 1's 24 and 10 fit in one.
        first = [list(cut) for cut in self.plan(unstarted, 0, 2)._micro]
        second = [list(cut) for cut in self.plan(unstarted, 1, 2)._micro]
        assert first == [[[0], [1]], [[0, 1]]]
        assert second == [[[1], [0]], [[0, 1]]]
        # A single rank cuts by its own rows only.
        alone = self.plan(unstarted, 0, 1)
        assert [len(cut) for cut in alone._micro] == [3, 1]


def test_stats_are_sums_over_real_tokens(policy: PolicyLearner, rollouts: list[Rollout]) -> None:
    old, _ = policy.logprobs(rollouts)
    stats = assemble(policy, policy, rollouts)
    tokens = sum(len(row.response_ids) for row in rollouts)
    assert (stats.num_samples, stats.num_tokens) == (8, tokens)
    assert stats.kl_total == pytest.approx(0.1 * tokens, rel=1e-4)  # the reference is .1 below
    assert stats.reward_total == pytest.approx(sum(SCORES) - 0.2 * 0.1 * tokens, rel=1e-4)
    assert stats.neg_logprob_sum == pytest.approx(-sum(float(row.sum()) for row in old), rel=1e-5)


def test_the_order_of_shards_does_not_matter(
    policy: PolicyLearner, rollouts: list[Rollout], make_learner: Callable[..., Any]
) -> None:
    other = make_learner(PolicyLearner)
    scores, parts = columns(rollouts, policy.logprobs(rollouts)[0])
    order = [2, 0, 1]
    shuffled = [parts[column * 3 + shard] for column in range(4) for shard in order]
    one = policy.assemble(0.2, scores, *parts)
    two = other.assemble(0.2, [scores[shard] for shard in order], *shuffled)
    assert one == two
    policy.learn(0.1, 0.9)
    other.learn(0.1, 0.9)
    for name, tensor in learnt_state(policy).items():
        assert torch.equal(tensor, learnt_state(other)[name]), name


@pytest.mark.parametrize("kind", [PolicyLearner, CriticLearner])
def test_a_step_does_not_depend_on_the_micro_batches(
    kind: type,
    make_learner: Callable[..., Any],
    policy: PolicyLearner,
    rollouts: list[Rollout],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One row per micro-batch or all rows in one: equal gradients, so equal first moments."""
    monkeypatch.setitem(PASS_TOKENS, "cpu", 10_000)  # as few passes as the limit allows
    moments, norms, reports = [], [], []
    for max_tokens in (48, 100_000):
        ppo = {"max_tokens_per_micro_batch": max_tokens, "mini_batch_size": 8}
        learner = make_learner(kind, ppo=ppo)
        assemble(learner, policy, rollouts)
        num_micro = sum(len(cut) for cut in learner._micro)
        assert num_micro == 1 if max_tokens == 100_000 else num_micro > 3
        report = learner.learn(0.1, 0.9)
        reports.append(report)
        norms.append(next(v for k, v in report.metrics.items() if k.endswith("grad_norm")))
        state = learnt_state(learner)
        moments.append(
            torch.cat([t.flatten() for n, t in state.items() if n.startswith("exp_avg/")])
        )
        assert report.samples_learnt == 8
    assert norms[0] > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=1e-6)
    for name, value in reports[0].metrics.items():
        assert reports[1].metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_the_first_step_starts_at_ratio_one(
    make_learner: Callable[..., Any], policy: PolicyLearner, rollouts: list[Rollout]
) -> None:
    learner = make_learner(PolicyLearner, ppo={"mini_batch_size": 8})
    stats = assemble(learner, policy, rollouts)
    mean = stats.advantage_total / stats.num_tokens
    report = learner.learn(mean, 1.0)
    assert report.metrics["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert report.metrics["val/ratio_max"] == pytest.approx(1, abs=1e-4)
    assert report.metrics["policy/clipfrac_avg"] == 0
    # At ratio 1 the loss is minus the mean advantage, which whitening made 0.
    assert report.metrics["loss/policy_avg"] == pytest.approx(0, abs=1e-4)


def test_learning_makes_good_responses_likelier(
    make_learner: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    learner = make_learner(PolicyLearner, ppo={"mini_batch_size": 8, "epochs": 3})
    before, _ = learner.logprobs(rollouts)
    stats = assemble(learner, learner, rollouts)
    learner.learn(stats.advantage_total / stats.num_tokens, 1.0)
    after, _ = learner.logprobs(rollouts)
    gains = [float((a - b).mean()) for a, b in zip(after, before, strict=True)]
    best, worst = int(np.argmax(SCORES)), int(np.argmin(SCORES))
    assert gains[best] > 0 > gains[worst]


def test_a_state_takes_a_learner_back(
    make_learner: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    one, other = make_learner(PolicyLearner), make_learner(PolicyLearner)
    assemble(one, one, rollouts)
    one.learn(0.0, 1.0)
    files, _ = one.state()
    assert set(files) == {
        "learner.safetensors",
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    other.load(files)
    assert other.adapter(1)[1].digest == one.adapter(1)[1].digest
    for learner in (one, other):
        assemble(learner, learner, rollouts)
        learner.learn(0.0, 1.0)
    for name, tensor in learnt_state(one).items():
        assert torch.equal(tensor, learnt_state(other)[name]), name


def test_the_base_is_the_reference_whatever_was_learnt(
    policy: PolicyLearner, rollouts: list[Rollout], make_config: Callable[..., Any], base: str
) -> None:
    assemble(policy, policy, rollouts)
    policy.learn(0.0, 1.0)
    learnt = policy.logprobs(rollouts)[0]
    reference, _ = Reference("reference-0", make_config(), base).logprobs(rollouts)
    answers, scalars = policy.ref_logprobs(rollouts)
    assert scalars is None
    for ours, theirs in zip(answers, reference, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.allclose(np.concatenate(learnt), np.concatenate(reference), atol=1e-3)
    for before, after in zip(learnt, policy.logprobs(rollouts)[0], strict=True):
        np.testing.assert_array_equal(before, after)


def test_the_critic_starts_at_zero_and_learns_returns(
    critic: CriticLearner, policy: PolicyLearner, rollouts: list[Rollout]
) -> None:
    values, _ = critic.values(rollouts)
    assert all((row == 0).all() for row in values)
    scores, parts = columns(rollouts, policy.logprobs(rollouts)[0])
    parts[9:] = [values[:3], values[3:6], values[6:]]
    losses = []
    for _ in range(4):
        critic.assemble(0.0, scores, *parts)
        losses.append(critic.learn(0.0, 1.0).metrics["loss/value_avg"])
    assert losses[-1] < losses[0]


def test_explained_variance_is_of_the_values_that_it_was_given(
    critic: CriticLearner, policy: PolicyLearner, rollouts: list[Rollout]
) -> None:
    scores, parts = columns(rollouts, policy.logprobs(rollouts)[0])
    # Without KL, with gamma 1, values that equal the score leave GAE nothing: returns = values.
    values = [
        np.full(len(row.response_ids), score, np.float32)
        for row, score in zip(rollouts, SCORES, strict=True)
    ]
    parts[9:] = [values[:3], values[3:6], values[6:]]
    critic.assemble(0.0, scores, *parts)
    assert critic._explained_variance == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("kind", [PolicyLearner, CriticLearner])
def test_learning_over_a_quantised_base_with_recomputed_activations(
    kind: type,
    quantization: str,
    wide_base: str,
    make_config: Callable[..., Any],
    rollouts: list[Rollout],
) -> None:
    states = []
    for recompute in (False, True):
        config = make_config(
            model={"max_length": 64, "quantization": quantization},
            policy={"gradient_checkpointing": recompute},
            critic={"gradient_checkpointing": recompute, "learning_rate": 1e-2, "lora": {"r": 4}},
        )
        learner = kind("learner-0", config, wide_base, "torch")
        learner.start()
        old = [np.full(len(row.response_ids), -5.0, np.float32) for row in rollouts]
        scores, parts = columns(rollouts, old)
        learner.assemble(0.2, scores, *parts)
        learner.learn(0.1, 0.9)
        states.append(learnt_state(learner))
        # B starts at zero: what is not zero was learnt.
        assert all(tensor.any() for name, tensor in states[-1].items() if "lora_B" in name)
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=1e-5, rtol=1e-4)
