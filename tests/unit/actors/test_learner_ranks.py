"""Learners as ranks of a group, and steps that are skipped or not finite."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from assembled_batches import SCORES, as_group, assemble, columns

from actors.critic_learner import CriticLearner
from actors.policy_learner import PolicyLearner
from rlhf_ray.cluster.learner_groups import merge_reports
from rlhf_ray.driver.guards import non_finite
from rlhf_ray.types import Rollout, StepReport


@pytest.mark.parametrize(("overflows", "skipped"), [([True, False], 1), ([True, True], 2)])
def test_steps_that_float16_skips_are_no_steps(
    make_learner: Callable[..., Any],
    rollouts: list[Rollout],
    monkeypatch: pytest.MonkeyPatch,
    overflows: list[bool],
    skipped: int,
) -> None:
    policy = make_learner(PolicyLearner, ppo={"mini_batch_size": 4})
    assemble(policy, policy, rollouts)
    engine: Any = policy._engine
    engine._overflows = True
    clip, left = torch.nn.utils.clip_grad_norm_, iter(overflows)

    def clipped(weights: Any, largest: float) -> torch.Tensor:
        norm = clip(weights, largest)
        return torch.tensor(math.inf) if next(left) else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    report = policy.learn(0.0, 1.0)
    assert report.metrics["policy/steps_skipped"] == skipped
    assert report.samples_learnt == 8
    assert engine._num_steps() == 2 - skipped
    assert ("policy/grad_norm" in report.metrics) == (skipped < 2)
    assert report.num_tokens == sum(policy._mini_batch_tokens[skipped:])


def test_a_loss_that_is_not_finite_is_no_overflow(
    make_learner: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    policy = make_learner(PolicyLearner, guards={"ratio": {"action": "off"}})
    assemble(policy, policy, rollouts)
    engine: Any = policy._engine
    engine._overflows = True
    with torch.no_grad():
        for param in engine._trainable.values():
            param.fill_(math.nan)
    report = policy.learn(0.0, 1.0)
    assert "policy/steps_skipped" not in report.metrics
    assert non_finite(report.metrics)


@pytest.mark.parametrize("kind", [CriticLearner, PolicyLearner])
@pytest.mark.parametrize("broken", [0, 1])
def test_a_loss_that_is_not_finite_on_one_rank_is_no_overflow_on_any(
    make_learner: Callable[..., Any],
    policy: PolicyLearner,
    rollouts: list[Rollout],
    kind: type[Any],
    broken: int,
) -> None:
    def learn(learner: Any) -> StepReport:
        assemble(learner, policy, rollouts)
        if learner._engine.rank == broken:
            learner._experience.returns_BT.fill_(math.nan)
            learner._experience.old_logprobs_BT.fill_(math.nan)
        learner._engine.step = learner._engine.discard  # the group's gradients are not finite
        return learner.learn(0.0, 1.0)

    learners = [make_learner(kind, guards={"ratio": {"action": "off"}}) for _ in range(2)]
    report = merge_reports(as_group(learners, learn))
    assert kind.skipped_name not in report.metrics
    assert non_finite(report.metrics)


def test_rank_0_alone_returns_what_is_the_same_on_all_ranks(policy: PolicyLearner) -> None:
    files, digest = policy.state()
    tensors, update = policy.adapter(1)
    policy._engine.rank = 1
    assert policy.state() == ({}, digest)
    assert policy.adapter(1) == (b"", update)
    assert update.digest == digest
    assert files["adapter_model.safetensors"] == tensors


def test_ranks_report_the_explained_variance_of_the_whole_batch(
    make_learner: Callable[..., Any], policy: PolicyLearner, rollouts: list[Rollout]
) -> None:
    critic = make_learner(CriticLearner, ppo={"gae_lambda": 1.0})
    scores, parts = columns(rollouts, policy.logprobs(rollouts)[0])
    # As above, but each value is off by .5, up or down; the returns stay the scores. Four ranks
    # hold two rows each, whose variances are not the batch's.
    values = [
        np.full(len(row.response_ids), score + (0.5 if place % 2 else -0.5), np.float32)
        for place, (row, score) in enumerate(zip(rollouts, SCORES, strict=True))
    ]
    returns = np.repeat(SCORES, [len(row.response_ids) for row in rollouts])
    errors = returns - np.concatenate(values)
    parts[9:] = [values[:3], values[3:6], values[6:]]
    reports = []
    for rank in range(4):
        critic._engine = SimpleNamespace(rank=rank, world_size=4, device=torch.device("cpu"))  # type: ignore[assignment]
        critic.assemble(0.0, scores, *parts)
        reports.append(StepReport(critic._report(), (0, 1), critic._experience.num_tokens))
    merged = merge_reports(reports).metrics["val/explained_variance"]
    assert merged == pytest.approx(1 - errors.var() / returns.var(), rel=1e-5)


def test_a_rank_weighs_its_means_by_the_tokens_of_the_steps_taken(
    policy: PolicyLearner, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    assemble(policy, policy, rollouts)
    steps = iter([True, False])
    monkeypatch.setattr(policy, "_moves_weights", lambda *_: next(steps))
    report = policy.learn(0.0, 1.0)
    assert report.num_tokens == sum(len(row.response_ids) for row in rollouts[:4])
