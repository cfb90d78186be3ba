from inspect import isfunction, signature
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms import policy_losses
from rlhf_ray.algorithms.advantages import gae
from rlhf_ray.algorithms.logprobs import token_logprobs
from rlhf_ray.algorithms.losses import (
    dpo_loss,
    pairwise_reward_loss,
    pointwise_reward_loss,
    policy_loss,
    value_loss,
)
from rlhf_ray.algorithms.policy_losses import resolve_policy_loss
from rlhf_ray.algorithms.rewards import token_rewards
from rlhf_ray.config.algorithms import POLICY_LOSSES

NAN, INF = float("nan"), float("inf")
GOLDEN_ADVANTAGES = [[0.961777, 0.903629, 0.646356, 0.669639], [-1.164877, -1.040858, -0.975666, 4]]
GOLDEN_RETURNS = [[0.9882125, 1.05075, 0.985, 1.1], [-0.4819, -0.502, -0.56, 0.0]]


def single_token_loss(log_ratio: float, advantage: float, **options: Any) -> tuple[float, float]:
    """Loss of one token, and its gradient with respect to the log-prob."""
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    loss, _ = policy_loss(
        logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1), **options
    )
    loss.backward()
    assert logprobs.grad is not None
    return loss.item(), logprobs.grad.item()


def test_policy_golden(golden: Any) -> None:
    loss, stats = policy_loss(
        golden.new_logprobs_BT, golden.logprobs_BT, torch.tensor(GOLDEN_ADVANTAGES), golden.mask_BT
    )
    assert loss.item() == pytest.approx(0.0585394, abs=1e-6)
    # Log-ratios .3, -.3, .05, 0 | -.1, .4, 0. The clip binds on the first token alone: good and
    # more likely. The second is good and less likely, the sixth bad and more likely.
    assert stats["clipfrac"].item() == pytest.approx(1 / 7)
    # (.09 + .09 + .0025 + .01 + .16) / 7 / 2
    assert stats["approxkl"].item() == pytest.approx(0.0251786, abs=1e-6)
    # -(.3 - .3 + .05 - .1 + .4) / 7
    assert stats["policykl"].item() == pytest.approx(-0.05, abs=1e-6)
    # exp: 1.349859 + .740818 + 1.051271 + 1 + .904837 + 1.491825 + 1 = 7.538610
    assert stats["ratio"].item() == pytest.approx(7.538610 / 7, abs=1e-5)
    assert stats["ratio_max"].item() == pytest.approx(1.491825, abs=1e-5)


def test_policy_second_golden(second_golden: Any) -> None:
    advantages_BT = torch.tensor([[0.824541, 0.817133, 0.803316], [-1.127307, -1.317683, 0.0]])
    loss, stats = policy_loss(
        second_golden.new_logprobs_BT,
        second_golden.logprobs_BT,
        advantages_BT,
        second_golden.mask_BT,
    )
    assert loss.item() == pytest.approx(-0.094654, abs=2e-6)
    assert stats["clipfrac"].item() == pytest.approx(0.6)
    assert stats["policykl"].item() == pytest.approx(-0.04, abs=1e-6)


# ratio 2 and 1/2 against bounds .8 and 1.2; the gradient of -A * ratio is -A * ratio.
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (2.0, 1.0, -1.2, 0.0),  # good, already much likelier: clipped, no push
        (2.0, -1.0, 2.0, 2.0),  # bad and likelier: full push down
        (0.5, 1.0, -0.5, -0.5),  # good but less likely: full push up
        (0.5, -1.0, 0.8, 0.0),  # bad, already less likely: clipped, no push
        (1.1, 1.0, -1.1, -1.1),  # inside the bounds
        (1.0, 1.0, -1.0, -1.0),  # the first step: the policy gradient itself
    ],
)
def test_the_four_corners_of_the_clip(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    log_ratio = torch.tensor(ratio).log().item()
    assert single_token_loss(log_ratio, advantage) == pytest.approx((loss, gradient), abs=1e-6)


def test_bounds_are_independent_and_can_be_off() -> None:
    up, down = torch.tensor(2.0).log().item(), torch.tensor(0.5).log().item()
    assert single_token_loss(up, 1.0, clip_high=0.3)[0] == pytest.approx(-1.3)
    assert single_token_loss(up, 1.0, clip_low=0.3)[0] == pytest.approx(-1.2)
    assert single_token_loss(down, -1.0, clip_low=0.3)[0] == pytest.approx(0.7)
    assert single_token_loss(down, -1.0, clip_high=0.3)[0] == pytest.approx(0.8)
    off = {"clip_low": INF, "clip_high": INF}
    assert single_token_loss(up, 1.0, **off) == pytest.approx((-2.0, -2.0))
    assert single_token_loss(down, -1.0, **off) == pytest.approx((0.5, 0.5))


def test_dual_clip_bounds_bad_tokens_only() -> None:
    log5 = torch.tensor(5.0).log().item()
    assert single_token_loss(log5, -1.0) == pytest.approx((5.0, 5.0))
    assert single_token_loss(log5, -1.0, dual_clip=3.0) == pytest.approx((3.0, 0.0))
    assert single_token_loss(log5, 1.0, dual_clip=3.0) == pytest.approx((-1.2, 0.0))
    assert single_token_loss(0.1, -1.0, dual_clip=3.0)[0] == pytest.approx(1.105171)
    with pytest.raises(ValueError, match=r"dual_clip must be above 1, got 0\.5"):
        single_token_loss(log5, -1.0, dual_clip=0.5)


@pytest.mark.parametrize("log_ratio", [500.0, -500.0])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_runaway_ratio_gives_no_nan(log_ratio: float, advantage: float) -> None:
    loss, gradient = single_token_loss(log_ratio, advantage)
    assert torch.tensor([loss, gradient]).isfinite().all()


def test_weights_multiply_each_token() -> None:
    ones, zeros = torch.ones(1, 3), torch.zeros(1, 3)
    logprobs = torch.zeros(1, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0]])
    weights = torch.tensor([[2.0, 0.5, NAN]])
    loss, _ = policy_loss(logprobs, zeros, ones, mask, weights=weights)
    loss.backward()
    # -(2 + .5) / 2 tokens: the weights do not enter the denominator.
    assert loss.item() == pytest.approx(-1.25)
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0, -0.25, 0.0]]))


def test_num_tokens_makes_micro_batches_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs, old, advantages, values = torch.randn(4, 4, 5, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 1, 2, 0])[:, None]
    whole_policy, _ = policy_loss(logprobs, old, advantages, mask)
    whole_value, _ = value_loss(values, old, advantages, mask)
    halves = [slice(0, 1), slice(1, 4)]
    policy_parts = [
        policy_loss(logprobs[h], old[h], advantages[h], mask[h], num_tokens=8)[0] for h in halves
    ]
    value_parts = [
        value_loss(values[h], old[h], advantages[h], mask[h], num_tokens=torch.tensor(8))[0]
        for h in halves
    ]
    torch.testing.assert_close(torch.stack(policy_parts).sum(), whole_policy)
    torch.testing.assert_close(torch.stack(value_parts).sum(), whole_value)


def test_stats_divide_by_the_mask_whatever_num_tokens_is() -> None:
    logprobs, zeros, ones = torch.full((1, 2), 0.5), torch.zeros(1, 2), torch.ones(1, 2)
    _, stats = policy_loss(logprobs, zeros, ones, ones, num_tokens=100)
    assert stats["approxkl"].item() == pytest.approx(0.125)
    _, stats = value_loss(logprobs, zeros, ones, ones, num_tokens=100)
    assert stats["error"].item() == pytest.approx(0.25)


def test_value_golden(golden: Any) -> None:
    loss, stats = value_loss(
        golden.new_values_BT, golden.values_BT, torch.tensor(GOLDEN_RETURNS), golden.mask_BT
    )
    assert 0.1 * loss.item() == pytest.approx(0.0203151, abs=1e-6)
    assert stats["clipfrac"].item() == pytest.approx(2 / 7)
    # v = .6, .1, .3, .5 | .05, -.6, 0: sum .95
    assert stats["value_mean"].item() == pytest.approx(0.95 / 7, abs=1e-6)
    # (v - R)^2 = .150709 + .903926 + .469225 + .36 + .282918 + .009604 + .3136 = 2.489982
    assert stats["error"].item() == pytest.approx(2.489982 / 7, abs=1e-5)


def test_value_second_golden(second_golden: Any) -> None:
    advantages_BT = torch.tensor([[0.861375, 0.8225, 0.75], [-9.381, -10.38, 0.0]])
    loss, _ = value_loss(
        second_golden.new_values_BT,
        second_golden.values_BT,
        advantages_BT + second_golden.values_BT,
        second_golden.mask_BT,
        clip=0.5,
    )
    assert loss.item() == pytest.approx(18.162304, abs=1e-5)


@pytest.mark.parametrize(
    ("value", "clip", "loss", "gradient"),
    [
        (0.5, 0.2, 0.5 * 0.8**2, 0.0),  # old 0, target 1: gone far enough towards it
        (0.1, 0.2, 0.5 * 0.9**2, -0.9),  # within the clip
        (-0.5, 0.2, 0.5 * 1.5**2, -1.5),  # moved away: full pull back
        (0.5, INF, 0.5 * 0.5**2, -0.5),  # no clip
    ],
)
def test_value_clip(value: float, clip: float, loss: float, gradient: float) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    result, _ = value_loss(values, torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), clip)
    result.backward()
    assert values.grad is not None
    assert (result.item(), values.grad.item()) == pytest.approx((loss, gradient), abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    garbage=st.sampled_from([NAN, INF, -INF, 1e30]),
)
def test_padding_changes_neither_losses_nor_gradients(
    lengths: list[int], seed: int, garbage: float
) -> None:
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(5, *mask.shape, generator=generator)

    def run(tensors: torch.Tensor) -> list[torch.Tensor]:
        new, old, advantages, weights, returns = tensors
        new = new.clone().requires_grad_()
        policy, policy_stats = policy_loss(new, old, advantages, mask, weights=weights)
        value, value_stats = value_loss(new, old, returns, mask)
        (gradient,) = torch.autograd.grad(policy + value, new)
        assert (gradient[~mask] == 0).all()
        return [policy, value, gradient, *policy_stats.values(), *value_stats.values()]

    for expected, got in zip(run(clean), run(clean.masked_fill(~mask, garbage)), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_a_batch_without_tokens_is_a_loss_of_zero_with_a_gradient() -> None:
    logprobs = torch.full((2, 3), NAN, requires_grad=True)
    garbage, mask = torch.full((2, 3), NAN), torch.zeros(2, 3)
    for loss, stats in (
        policy_loss(logprobs, garbage, garbage, mask),
        value_loss(logprobs, garbage, garbage, mask),
    ):
        assert loss.item() == 0
        assert {value.item() for value in stats.values()} == {0.0}
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert torch.equal(gradient, torch.zeros(2, 3))


def test_results_are_fp32_and_stats_are_detached() -> None:
    half = torch.ones(1, 2, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(1, 2)
    for loss, stats in (policy_loss(half, half, half, mask), value_loss(half, half, half, mask)):
        assert loss.dtype == torch.float32
        assert all(not x.requires_grad and x.ndim == 0 for x in stats.values())
        assert all(x.dtype == torch.float32 for x in stats.values())


def test_one_epoch_without_clip_is_reinforce() -> None:
    """Clip off, one epoch, gamma = lambda = 1, V = 0: PPO's gradient is REINFORCE's."""
    generator = torch.Generator().manual_seed(0)
    logits_BTV = torch.randn(3, 4, 5, generator=generator, requires_grad=True)
    tokens_BT = torch.randint(5, (3, 4), generator=generator)
    mask_BT = torch.arange(4) < torch.tensor([4, 2, 3])[:, None]
    scores_B = torch.randn(3, generator=generator)
    rewards_BT = token_rewards(scores_B, torch.randn(3, 4, generator=generator), mask_BT, 0.2)

    logprobs_BT = token_logprobs(logits_BTV, tokens_BT)
    advantages_BT, _ = gae(rewards_BT, torch.zeros(3, 4), mask_BT, gamma=1.0, lam=1.0)
    loss, stats = policy_loss(
        logprobs_BT, logprobs_BT.detach(), advantages_BT, mask_BT, clip_low=INF, clip_high=INF
    )
    (ppo_gradient,) = torch.autograd.grad(loss, logits_BTV)
    assert stats["ratio"].item() == 1

    # REINFORCE from its definition: raise log pi(token) by the rewards from that token on.
    objective = torch.zeros(())
    for row in range(3):
        for t in range(int(mask_BT[row].sum())):
            log_pi = torch.log_softmax(logits_BTV[row, t], -1)[tokens_BT[row, t]]
            objective = objective + log_pi * rewards_BT[row, t:].sum()
    (expected,) = torch.autograd.grad(-objective / mask_BT.sum(), logits_BTV)
    torch.testing.assert_close(ppo_gradient, expected)
    assert expected.abs().max() > 0.01


def test_a_step_makes_the_better_token_likelier() -> None:
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    tokens = torch.tensor([[0, 1]])
    logprobs = token_logprobs(logits, tokens)
    loss, _ = policy_loss(
        logprobs, logprobs.detach(), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    change = (token_logprobs(logits - gradient, tokens) - logprobs)[0].tolist()
    assert change[0] > 0 > change[1]


def test_pairwise_golden() -> None:
    # Gaps 1, -1, 0: (.313262 + 1.313262 + .693147) / 3
    chosen_B, rejected_B = torch.tensor([1.0, -0.5, 2.0]), torch.tensor([0.0, 0.5, 2.0])
    assert pairwise_reward_loss(chosen_B, rejected_B).item() == pytest.approx(0.773224, abs=1e-6)


def test_pairwise_margin_and_centring_by_hand() -> None:
    chosen_B, rejected_B = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    # Margins 1 and -1 bring both gaps (1, -1) to 0: log 2.
    margin_B = torch.tensor([1.0, -1.0])
    assert pairwise_reward_loss(chosen_B, rejected_B, margin_B).item() == pytest.approx(0.693147)
    # A margin of 1 asks for more: gaps 0 and -2, (.693147 + 2.126928) / 2.
    assert pairwise_reward_loss(chosen_B, rejected_B, 1.0).item() == pytest.approx(1.4100375)
    # Sums 3 and 1: + .1 * (9 + 1) / 2 on top of (.313262 + 1.313262) / 2.
    centred = pairwise_reward_loss(chosen_B, rejected_B, centre=0.1)
    assert centred.item() == pytest.approx(0.813262 + 0.5, abs=1e-6)


def test_pointwise_losses_by_hand() -> None:
    scores_B = torch.tensor([1.0, -0.5], dtype=torch.bfloat16)
    # A liked answer at 1, a disliked one at -.5: (.313262 + .474077) / 2.
    loss = pointwise_reward_loss(scores_B, torch.tensor([1.0, 0.0]), "bce")
    assert loss.item() == pytest.approx(0.393669, abs=1e-6)
    # Both the wrong way round: (1.313262 + .974077) / 2.
    loss = pointwise_reward_loss(scores_B, torch.tensor([0.0, 1.0]), "bce")
    assert loss.item() == pytest.approx(1.143669, abs=1e-6)
    # Ratings 3 and 0: (4 + .25) / 2.
    assert pointwise_reward_loss(scores_B, torch.tensor([3.0, 0.0]), "mse").item() == 2.125
    with pytest.raises(ValueError, match="shape"):
        pointwise_reward_loss(scores_B, torch.zeros(2, 1), "mse")


def test_pairwise_loss_is_finite_where_a_naive_sigmoid_is_not() -> None:
    chosen_B = torch.tensor([-200.0], requires_grad=True)
    loss = pairwise_reward_loss(chosen_B, torch.tensor([200.0]))
    loss.backward()
    assert loss.item() == pytest.approx(400)
    assert chosen_B.grad is not None
    assert chosen_B.grad.item() == pytest.approx(-1)


def test_dpo_by_hand() -> None:
    chosen_B, rejected_B = torch.tensor([2.0, -1.0]), torch.tensor([0.0, 1.0])
    # Gaps 2 and -2 times .5: -log sigmoid of 1 and -1.
    assert dpo_loss(chosen_B, rejected_B, 0.5).item() == pytest.approx(0.813262, abs=1e-6)
    # .9 * .313262 + .1 * 1.313262 of the first pair alone.
    smoothed = dpo_loss(chosen_B[:1], rejected_B[:1], 0.5, label_smoothing=0.1)
    assert smoothed.item() == pytest.approx(0.413262, abs=1e-6)
    # Aim 1 / (2 * .5) = 1: ((2 - 1)^2 + (-2 - 1)^2) / 2.
    assert dpo_loss(chosen_B, rejected_B, 0.5, "ipo").item() == pytest.approx(5)
    with pytest.raises(ValueError, match="sigmoid or ipo, got 'hinge'"):
        dpo_loss(chosen_B, rejected_B, 0.5, "hinge")  # type: ignore[arg-type]


def test_shapes_must_agree() -> None:
    square, row = torch.ones(2, 2), torch.ones(2)
    with pytest.raises(ValueError, match=r"advantages \(2,\)"):
        policy_loss(square, square, row, square)
    with pytest.raises(ValueError, match=r"returns \(2,\)"):
        value_loss(square, square, row, square)
    with pytest.raises(ValueError, match=r"rejected_B \(2, 2\)"):
        pairwise_reward_loss(row, square)
    with pytest.raises(ValueError, match=r"margin \(2, 2\)"):
        pairwise_reward_loss(row, row, margin=square)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_policy_loss_of_the_registry_takes_and_returns_what_the_learner_does(name: str) -> None:
    loss = resolve_policy_loss(name)
    assert list(signature(loss).parameters) == list(signature(policy_loss).parameters)
    zeros, ones = torch.zeros(1, 2), torch.ones(1, 2)
    value, stats = loss(zeros, zeros, ones, ones, num_tokens=4.0)
    assert value.item() == pytest.approx(-0.5)  # at a ratio of 1 every loss is minus the advantage
    assert {"approxkl", "clipfrac", "ratio", "ratio_max"} <= stats.keys()


def test_every_policy_loss_has_a_name_in_the_registry() -> None:
    takes = ["logprobs", "old_logprobs", "advantages", "mask"]
    found = {
        f"{policy_losses.__name__}:{name}"
        for name, function in vars(policy_losses).items()
        if isfunction(function) and list(signature(function).parameters)[:4] == takes
    }
    assert found == set(POLICY_LOSSES.values())
