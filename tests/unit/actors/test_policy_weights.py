"""Tests of the weights of a batch's tokens in the policy's loss: means over them, and masks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from assembled_batches import SCORES, assemble, columns

from actors.critic_learner import CriticLearner
from actors.policy_learner import PolicyLearner
from rlhf_ray.types import Rollout

MakeLearner = Callable[..., Any]
MEANS = ("token_mean", "sequence_mean", "dr_grpo")


def gradient_of(learner: Any, rollouts: list[Rollout], rank: int = 0, world_size: int = 1) -> Any:
    """Return the gradient of a mini-batch on one rank."""
    engine = learner._engine
    engine.rank, engine.world_size, found = rank, world_size, []
    engine.sum_over_ranks = lambda value: value

    def step() -> float:
        found.append(torch.cat([p.grad.flatten() for p in engine._trainable.values()]))
        return float(engine.discard() or 0.0)

    engine.step = step
    scores, parts = columns(
        rollouts, [np.full(len(r.response_ids), -5, np.float32) for r in rollouts]
    )
    learner.assemble(0.5, scores, *parts)
    learner.learn(0.0, 1.0)
    return found[0]


@pytest.mark.parametrize("policy_loss", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("mean", MEANS)
def test_a_step_depends_on_neither_micro_batches_nor_ranks(
    make_learner: MakeLearner, rollouts: list[Rollout], mean: str, policy_loss: str
) -> None:
    """With the terms of entropy and KL, which are the same mean."""
    ppo = {
        "loss_aggregation": mean,
        "policy_loss": policy_loss,
        "advantage": "reinforce",
        "mini_batch_size": 8,
        "entropy_coef": 0.1,
        "kl_in": "loss",
        "kl_estimator": "k3",
    }
    whole = gradient_of(make_learner(PolicyLearner, ppo=ppo), rollouts)
    small = {**ppo, "max_tokens_per_micro_batch": 48}
    assert whole.norm() > 0
    torch.testing.assert_close(
        gradient_of(make_learner(PolicyLearner, ppo=small), rollouts), whole, rtol=1e-3, atol=1e-5
    )
    ranks = [
        gradient_of(make_learner(PolicyLearner, ppo=small), rollouts, rank, 2) for rank in (0, 1)
    ]
    torch.testing.assert_close(sum(ranks) / 2, whole, rtol=1e-3, atol=1e-5)


def test_the_loss_is_the_mean_that_was_asked_for(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    """At a ratio of 1 a token's loss is minus its advantage, which is the response's score."""
    lengths = np.array([len(r.response_ids) for r in rollouts])
    expected = {
        "token_mean": np.dot(SCORES, lengths) / lengths.sum(),
        "sequence_mean": np.mean(SCORES),
        "dr_grpo": np.dot(SCORES, lengths) / (8 * 16),
    }
    for mean in MEANS:
        ppo = {"loss_aggregation": mean, "advantage": "reinforce", "mini_batch_size": 8}
        for max_tokens in (48, 8192):
            small = {"max_tokens_per_micro_batch": max_tokens}
            learner = make_learner(PolicyLearner, ppo=ppo | small)
            assemble(learner, learner, rollouts, kl_coef=0.0)
            loss = learner.learn(0.0, 1.0).metrics["loss/policy_avg"]
            assert loss == pytest.approx(-expected[mean], rel=1e-4), mean


@pytest.mark.parametrize("level", ["token", "geometric"])
def test_what_is_masked_takes_no_part_in_the_mean(
    make_learner: MakeLearner, rollouts: list[Rollout], level: str
) -> None:
    lengths = [len(r.response_ids) for r in rollouts]
    rows = [row + 5 for row in make_learner(PolicyLearner).logprobs(rollouts)[0]]
    if level == "geometric":
        rows = [np.full(len(row), row.mean()) for row in rows]
    ratios = np.exp(np.concatenate(rows))
    low = min(float(np.median(ratios)), 0.9)
    kept = (ratios >= low) & (ratios <= 2.0)
    mask = {"level": level, "low": low * 0.9999, "high": 2.0}
    ppo = {"importance_mask": mask, "advantage": "reinforce", "mini_batch_size": 8}
    learner = make_learner(PolicyLearner, ppo=ppo)
    assert 0 < kept.sum() < len(kept)
    assemble(learner, learner, rollouts, kl_coef=0.0)
    report = learner.learn(0.0, 1.0)
    scores = np.repeat(SCORES, lengths)
    assert report.metrics["loss/policy_avg"] == pytest.approx(-scores[kept].mean(), rel=1e-4)
    assert report.metrics["sampler/masked_share"] == pytest.approx(1 - kept.mean())
    assert report.metrics["sampler/weight_mean"] == pytest.approx(kept.mean())


def test_a_mini_batch_that_is_masked_whole_moves_nothing(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    ppo = {
        "importance_mask": {"low": 1.0, "high": 1.0001},
        "entropy_coef": 0.1,
        "mini_batch_size": 8,
    }
    learner = make_learner(PolicyLearner, ppo=ppo)
    assemble(learner, learner, rollouts, kl_coef=0.0)
    metrics = learner.learn(0.0, 1.0).metrics
    assert metrics["sampler/masked_share"] == 1
    assert metrics["loss/policy_avg"] == metrics["policy/grad_norm"] == 0


def cut_off(rollouts: list[Rollout], rows: set[int]) -> list[Rollout]:
    return [
        replace(rollout, finish_reason="length" if row in rows else "stop")
        for row, rollout in enumerate(rollouts)
    ]


def test_responses_that_were_cut_off_can_be_left_out_of_the_policys_loss(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    ppo = {
        "overlong": {"truncated": "mask"},
        "loss_aggregation": "sequence_mean",
        "advantage": "reinforce",
        "mini_batch_size": 8,
    }
    learner = make_learner(PolicyLearner, ppo=ppo)
    stats = assemble(learner, learner, cut_off(rollouts, {1, 4}), kl_coef=0.0)
    report = learner.learn(0.0, 1.0)
    kept = [score for row, score in enumerate(SCORES) if row not in (1, 4)]
    assert report.metrics["loss/policy_avg"] == pytest.approx(-np.mean(kept), rel=1e-4)
    assert sorted(report.positions) == list(range(8))
    assert stats.num_tokens == sum(len(r.response_ids) for r in rollouts)


def test_the_critics_value_replaces_the_score_of_a_response_that_was_cut_off(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    ppo = {"overlong": {"truncated": "bootstrap"}, "mini_batch_size": 8, "gae_lambda": 1.0}
    critic, policy = (make_learner(kind, ppo=ppo) for kind in (CriticLearner, PolicyLearner))
    values, _ = critic.values(rollouts)
    lengths = [len(r.response_ids) for r in rollouts]
    assert [len(row) for row in values] == [length + 1 for length in lengths]
    values = [np.append(np.zeros(length, np.float32), np.float32(7)) for length in lengths]
    scores, parts = columns(cut_off(rollouts, {1, 4}), policy.logprobs(rollouts)[0])
    parts[9:] = [values[:3], values[3:6], values[6:]]
    # Values are 0 and lambda is 1: returns and advantages are what stands at the end.
    expected = [7.0 if row in (1, 4) else score for row, score in enumerate(SCORES)]
    for learner, field in ((critic, "returns_BT"), (policy, "advantages_BT")):
        stats = learner.assemble(0.0, scores, *parts)
        found = getattr(learner._experience, field)[:, 0].tolist()
        assert found == pytest.approx(expected), field
        assert stats.reward_total == pytest.approx(sum(SCORES))
        learner.learn(0.0, 1.0)
