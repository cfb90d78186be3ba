"""Tests of the ratio guard: mini-batches on which the policy is far from the one that sampled."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors.learner import Tally
from actors.policy_learner import PolicyLearner
from rlhf_ray.types import Rollout, StepReport

Make = Callable[..., PolicyLearner]
SCORES = (0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 0.25, 1.0)


def learnt_state(policy: PolicyLearner) -> dict[str, torch.Tensor]:
    return policy._engine.export_state()


@pytest.fixture
def make_policy(make_learner: Callable[..., Any]) -> Make:
    """A function that makes a policy with a ratio guard of a given action."""

    def make(action: str) -> PolicyLearner:
        return make_learner(PolicyLearner, guards={"ratio": {"action": action}})

    return make


def assemble(policy: PolicyLearner, rollouts: list[Rollout], shift: float, rows: slice) -> None:
    """Assemble with old log-probs of some rows lowered by a shift: their ratios are exp(shift)."""
    old = policy.logprobs(rollouts)[0]
    for row in range(*rows.indices(len(rollouts))):
        old[row] = old[row] - np.float32(shift)
    values = [np.zeros(len(logprobs), np.float32) for logprobs in old]
    policy.assemble(0.0, [SCORES], rollouts, old, old, values)


def only_first_mini_batch(policy: PolicyLearner) -> StepReport:
    policy._mini_batch_tokens = policy._mini_batch_tokens[:1]
    return policy.learn(0.0, 1.0)


@pytest.mark.parametrize("shift", [3.0, math.nan, math.inf])
def test_a_mini_batch_over_the_bound_moves_nothing(
    make_policy: Make, rollouts: list[Rollout], shift: float
) -> None:
    second = slice(4, 8)  # of mini-batches of four
    policy, other = make_policy("skip"), make_policy("skip")
    assemble(policy, rollouts, shift, second)
    assemble(other, rollouts, shift, second)
    report, expected = policy.learn(0.0, 1.0), only_first_mini_batch(other)
    assert report.samples_learnt == 8
    state = learnt_state(policy)
    for name, tensor in learnt_state(other).items():
        assert torch.equal(state[name], tensor), name
        assert torch.isfinite(tensor).all(), name
    assert report.metrics["policy/ratio_exceeded"] == 1
    assert report.metrics["loss/policy_avg"] == expected.metrics["loss/policy_avg"]
    assert report.metrics["policy/grad_norm"] == expected.metrics["policy/grad_norm"]
    if shift == 3:
        # The first step moves the policy a little before the second mini-batch is looked at.
        assert report.metrics["val/ratio_minibatch_max"] == pytest.approx(math.exp(3), rel=0.5)


def test_a_warning_counts_and_steps(make_policy: Make, rollouts: list[Rollout]) -> None:
    policy, other = make_policy("warn"), make_policy("off")
    reports = []
    for learner in (policy, other):
        assemble(learner, rollouts, 5.0, slice(4, 8))
        reports.append(learner.learn(0.0, 1.0))
    assert reports[0].metrics["policy/ratio_exceeded"] == 1
    assert not {"policy/ratio_exceeded", "val/ratio_minibatch_max"} & set(reports[1].metrics)
    for name, tensor in learnt_state(other).items():
        assert torch.equal(learnt_state(policy)[name], tensor), name
    assert int(learnt_state(policy)["num_steps"]) == 2


def test_an_iteration_of_which_nothing_is_learnt_still_reports(
    make_policy: Make, rollouts: list[Rollout]
) -> None:
    policy = make_policy("skip")
    before = learnt_state(policy)
    assemble(policy, rollouts, 5.0, slice(0, 8))
    report = policy.learn(0.0, 1.0)
    assert set(report.metrics) == {"policy/ratio_exceeded", "val/ratio_minibatch_max"}
    assert report.metrics["policy/ratio_exceeded"] == 2
    assert report.samples_learnt == 8
    assert all(torch.equal(tensor, before[name]) for name, tensor in learnt_state(policy).items())
    assemble(policy, rollouts, 0.0, slice(0, 8))
    assert policy.learn(0.0, 1.0).metrics["policy/ratio_exceeded"] == 0, "counted by iteration"


@pytest.mark.parametrize(
    ("mine", "others", "steps"),
    [
        # 10 of 30 tokens are mine: (10 * 25 + 20 * 1) / 30 = 9, (10 * 1 + 20 * 16) / 30 = 11.
        (25.0, 1.0, True),
        (1.0, 16.0, False),
        (1.0, math.nan, False),
    ],
)
def test_the_mean_is_over_all_ranks(
    make_policy: Make, mine: float, others: float, steps: bool
) -> None:
    policy = make_policy("skip")
    tally = Tally()
    tally.add({"val/ratio": torch.tensor(mine)}, 10)
    policy._engine = SimpleNamespace(sum_over_ranks=lambda value: value + 20 * others)  # type: ignore[assignment]
    assert policy._moves_weights(tally, 30) is steps
