"""Tests of schedules, of the stop at a KL, and of mini-batches that are drawn again."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from assembled_batches import as_group, assemble, columns, learnt_state

from actors.critic_learner import CriticLearner
from actors.policy_learner import PolicyLearner
from rlhf_ray.cluster.learner_groups import merge_reports
from rlhf_ray.errors import ConfigError
from rlhf_ray.types import Rollout, StepReport

MakeLearner = Callable[..., Any]


def rate(learner: Any) -> float:
    (group,) = learner._engine._optimizer.param_groups
    return group["lr"]


def test_both_learners_follow_the_schedule_by_iteration(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    ppo = {"scheduler": "linear", "warmup_iterations": 2, "iterations": 6}
    policy, critic = (make_learner(kind, ppo=ppo) for kind in (PolicyLearner, CriticLearner))
    for iteration, share in ((6, 0.25), (1, 0.5), (3, 1.0)):  # in any order: a run may resume
        for learner, name in ((policy, "policy"), (critic, "val")):
            assemble(learner, policy, rollouts)
            metrics = learner.learn(0.0, 1.0, iteration).metrics
            assert rate(learner) == pytest.approx(1e-2 * share)
            assert metrics[f"{name}/learning_rate"] == pytest.approx(1e-2 * share)


def test_the_policys_schedule_begins_after_the_critics_warm_up(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    ppo = {"scheduler": "linear", "critic_warmup": 2, "iterations": 6}
    policy, critic = (make_learner(kind, ppo=ppo) for kind in (PolicyLearner, CriticLearner))
    for iteration, of_policy, of_critic in ((3, 1.0, 4 / 6), (5, 0.5, 2 / 6)):
        for learner, share in ((policy, of_policy), (critic, of_critic)):
            assemble(learner, policy, rollouts)
            learner.learn(0.0, 1.0, iteration)
            assert rate(learner) == pytest.approx(1e-2 * share)


def test_a_constant_rate_is_not_logged(make_learner: MakeLearner, rollouts: list[Rollout]) -> None:
    policy = make_learner(PolicyLearner)
    assemble(policy, policy, rollouts)
    metrics = policy.learn(0.0, 1.0, 7).metrics
    assert rate(policy) == 1e-2
    assert not {"policy/learning_rate", "policy/epochs", "sampler/ess_share"} & metrics.keys()


@pytest.mark.parametrize(("bound", "num_epochs"), [(1e-9, 1), (100.0, 4)])
def test_all_ranks_stop_after_an_epoch_whose_kl_is_too_large(
    make_learner: MakeLearner, rollouts: list[Rollout], bound: float, num_epochs: int
) -> None:
    """A single mini-batch has no KL in the first epoch: ratios are 1; two have in the first."""
    ppo = {"stop_kl": bound, "epochs": 4, "advantage": "reinforce", "mini_batch_size": 4}
    learners = [make_learner(PolicyLearner, ppo=ppo) for _ in range(2)]

    def learn(learner: Any) -> StepReport:
        assemble(learner, learner, rollouts)
        return learner.learn(0.0, 1.0)

    reports = as_group(learners, learn)
    assert [report.metrics["policy/epochs"] for report in reports] == [num_epochs] * 2
    merged = merge_reports(reports)
    assert merged.metrics["policy/epochs"] == num_epochs
    assert sorted(merged.positions) == list(range(8))
    assert merged.num_tokens == num_epochs * sum(len(r.response_ids) for r in rollouts)


def test_the_kl_of_a_stop_is_of_all_ranks(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    """One rank's rows alone are beyond the bound, the mean over both is not, and the reverse."""
    for bound, num_epochs in ((0.3, 1), (0.6, 2)):
        ppo = {"stop_kl": bound, "epochs": 2, "advantage": "reinforce", "mini_batch_size": 8}
        ppo |= {"learning_rate": 1e-9}
        learners = [make_learner(PolicyLearner, ppo=ppo) for _ in range(2)]

        def learn(learner: Any) -> StepReport:
            # Rank 1's rows lie 1.4 nats apart from the policy: .98 nats each, .49 or so over both.
            gap = 1.4 * learner._engine.rank
            old = [row - gap for row in learner.logprobs(rollouts)[0]]
            scores, parts = columns(rollouts, old)
            learner.assemble(0.0, scores, *parts)
            return learner.learn(0.0, 1.0)

        lengths = [len(r.response_ids) for r in rollouts]
        mean = 0.98 * sum(lengths[1::2]) / sum(lengths)
        assert 0.3 < mean < 0.6
        reports = as_group(learners, learn)
        assert [report.metrics["policy/epochs"] for report in reports] == [num_epochs] * 2


@pytest.mark.parametrize("kind", [PolicyLearner, CriticLearner])
@pytest.mark.parametrize("world_size", [1, 2])
def test_mini_batches_are_drawn_again_in_each_later_epoch(
    make_learner: MakeLearner, rollouts: list[Rollout], kind: type[Any], world_size: int
) -> None:
    ppo = {"redraw_mini_batches": True, "epochs": 3}
    numbers = {tuple(r.response_ids.tolist()): r.position for r in rollouts}

    def mini_batches(iteration: int) -> list[list[list[int]]]:
        """Rows of each rank's mini-batches, in order of learning; epochs are two of them."""

        def learn(learner: Any) -> list[list[int]]:
            seen: list[list[int]] = []
            backward = learner._backward

            def watched(batches: Any, num_tokens: int) -> Any:
                parts = list(batches)
                seen.append(
                    [
                        numbers[tuple(row[: int(mask.sum())].tolist())]
                        for part in parts
                        for row, mask in zip(part.responses_BT, part.mask_BT, strict=True)
                    ]
                )
                return backward(iter(parts), num_tokens)

            learner._backward = watched
            assemble(learner, make_learner(PolicyLearner), rollouts)
            report = learner.learn(0.1, 0.9, iteration)
            assert len(report.positions) == 8 // world_size
            return seen

        return as_group([make_learner(kind, ppo=ppo) for _ in range(world_size)], learn)

    first = mini_batches(1)
    whole = [sorted(chain(*parts)) for parts in zip(*first, strict=True)]
    assert whole[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]], "the first epoch is in prompt order"
    for epoch in (1, 2):
        assert sorted(chain(*whole[2 * epoch : 2 * epoch + 2])) == list(range(8))
    assert len({str(sorted(whole[i : i + 2])) for i in (0, 2, 4)}) > 1
    assert mini_batches(1) == first, "a step that is made again draws the same"
    assert mini_batches(2) != first


def test_a_redrawn_batch_is_whitened_and_weighed_as_the_first(
    make_learner: MakeLearner, rollouts: list[Rollout]
) -> None:
    """With one mini-batch all draws are the same batch, so the steps are the same."""
    states = []
    for redraw in (False, True):
        ppo = {
            "redraw_mini_batches": redraw,
            "epochs": 3,
            "mini_batch_size": 8,
            "loss_aggregation": "sequence_mean",
            "importance_cap": 2.0,
        }
        learner = make_learner(PolicyLearner, ppo=ppo)
        assemble(learner, learner, rollouts)
        learner.learn(0.3, 0.7)
        states.append(learnt_state(learner))
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("ppo", "message"),
    [
        (
            {"advantage": "rloo", "samples_per_prompt": 2, "critic_warmup": 1},
            r"critic_warmup 1 needs a critic, which a run with ppo\.advantage rloo has not",
        ),
        ({"critic_warmup": 4, "iterations": 4}, r"leave nothing of ppo\.iterations 4"),
        ({"warmup_iterations": 5, "iterations": 4}, r"leave nothing of ppo\.iterations 4"),
        ({"scheduler": "cosin"}, r"ppo\.scheduler"),
        ({"stop_kl": 0}, r"ppo\.stop_kl"),
    ],
)
def test_what_makes_no_sense_is_refused(
    make_config: Callable[..., Any], ppo: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(ppo=ppo)
