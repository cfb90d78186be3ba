"""A learner that loads a state of another config learns as its own config says."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from assembled_batches import assemble, learnt_state
from torch import Tensor

from actors.critic_learner import CriticLearner
from actors.learner import Learner
from actors.policy_learner import PolicyLearner
from rlhf_ray.types import Rollout

State = dict[str, Tensor]
Steps = Callable[..., tuple[State, State, State]]
KINDS = pytest.mark.parametrize("kind", [PolicyLearner, CriticLearner])
BETAS = (0.9, 0.999)
RATE = 1e-2


@pytest.fixture
def steps(
    make_learner: Callable[..., Any], policy: PolicyLearner, rollouts: list[Rollout]
) -> Steps:
    """Return a function: a state after one step, after one more, and after one otherwise."""

    def learn(learner: Any) -> State:
        assemble(learner, policy, rollouts)
        learner.learn(0.0, 1.0)
        return learnt_state(learner)

    def run(kind: type[Learner], **ppo: float) -> tuple[State, State, State]:
        usual = make_learner(kind, ppo={"mini_batch_size": 8})
        critic = {"learning_rate": ppo.get("learning_rate", RATE)}
        resumed = make_learner(kind, ppo={"mini_batch_size": 8, **ppo}, critic=critic)
        before = learn(usual)
        resumed.load(usual.state()[0])
        return before, learn(usual), learn(resumed)

    return run


def part(state: State, name: str) -> Tensor:
    """All of a part of a state: weight, exp_avg or exp_avg_sq."""
    names = sorted(key for key in state if key.startswith(f"{name}/"))
    return torch.cat([state[key].double().flatten() for key in names])


def moved(before: State, after: State) -> Tensor:
    return part(after, "weight") - part(before, "weight")


@KINDS
def test_a_step_is_as_long_as_the_changed_rate_says(kind: type[Learner], steps: Steps) -> None:
    before, usual, now = steps(kind, learning_rate=RATE / 4)
    assert moved(before, usual).abs().max() > RATE / 4
    torch.testing.assert_close(moved(before, now), moved(before, usual) / 4, rtol=1e-2, atol=1e-6)
    assert torch.equal(part(now, "exp_avg"), part(usual, "exp_avg"))


@KINDS
def test_a_changed_epsilon_is_the_one_in_adams_formula(kind: type[Learner], steps: Steps) -> None:
    before, usual, now = steps(kind, adam_epsilon=1.0)
    mean = part(now, "exp_avg") / (1 - BETAS[0] ** 2)
    square = part(now, "exp_avg_sq") / (1 - BETAS[1] ** 2)
    expected = -RATE * mean / (square.sqrt() + 1.0)
    torch.testing.assert_close(moved(before, now), expected, rtol=1e-2, atol=1e-6)
    assert moved(before, now).norm() < moved(before, usual).norm() / 2


@KINDS
def test_a_changed_bound_clips_the_next_gradient(kind: type[Learner], steps: Steps) -> None:
    before, usual, now = steps(kind, max_grad_norm=1e-3)
    old = BETAS[0] * part(before, "exp_avg")
    norms = [
        float((part(state, "exp_avg") - old).norm()) / (1 - BETAS[0]) for state in (usual, now)
    ]
    assert norms[0] > 2e-3
    assert norms[1] == pytest.approx(1e-3, rel=2e-2)


@pytest.mark.parametrize(
    ("key", "value", "num_steps"), [("epochs", 3, 3), ("mini_batch_size", 2, 4)]
)
def test_a_changed_number_of_steps_is_taken(
    key: str, value: int, num_steps: int, steps: Steps
) -> None:
    _, usual, now = steps(PolicyLearner, **{key: value})
    assert int(usual["num_steps"]) == 2
    assert int(now["num_steps"]) == 1 + num_steps
