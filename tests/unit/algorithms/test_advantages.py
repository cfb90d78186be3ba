from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algorithms.advantages import (
    describe,
    dr_grpo,
    equal_groups,
    gae,
    grpo,
    reinforce,
    resolve,
    rloo,
)
from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.rewards import score_position, token_rewards
from rlhf_ray.algorithms.whitening import masked_whiten
from rlhf_ray.config.algorithms import ESTIMATORS

NAN = float("nan")


def test_golden(golden: Any) -> None:
    # Row 1, from the end: delta = 1.1 - .4 = .7, -.08 + .4 - .3 = .02, .1 + .3 - .2 = .2,
    # -.02 + .2 - .1 = .08; A = .7, .02 + .95 * .7 = .685, .2 + .95 * .685 = .85075,
    # .08 + .95 * .85075 = .888213; return = A + V.
    # Row 2 ends at its third token: the value 5 of the padding must not enter.
    rewards_BT = torch.tensor([[-0.02, 0.1, -0.08, 1.1], [0.0, 0.04, -0.56, 0.0]])
    advantages_BT, returns_BT = gae(rewards_BT, golden.values_BT, golden.mask_BT, 1.0, 0.95)
    expected_BT = torch.tensor([[0.988212, 1.050750, 0.985, 1.1], [-0.4819, -0.502, -0.56, 0.0]])
    torch.testing.assert_close(returns_BT, expected_BT, rtol=0, atol=2e-6)
    real_BT = golden.mask_BT.bool()
    torch.testing.assert_close(
        advantages_BT[real_BT], (expected_BT - golden.values_BT)[real_BT], rtol=0, atol=2e-6
    )
    assert advantages_BT[1, 3] == 0


def test_golden_with_whitened_rewards(golden: Any) -> None:
    # Rewards whitened with their mean kept; padding that is not zeroed again afterwards would
    # leak the mean back in (-1.2598, -1.2333, -1.2845).
    kl_BT = kl_estimate(golden.logprobs_BT, golden.ref_logprobs_BT, "k1")
    rewards_BT = token_rewards(golden.scores_B, kl_BT, golden.mask_BT, kl_coef=0.2)
    rewards_BT = masked_whiten(rewards_BT, golden.mask_BT, shift_mean=False)
    _, returns_BT = gae(rewards_BT, golden.values_BT, golden.mask_BT, 1.0, 0.95)
    expected_T = torch.tensor([-1.1885, -1.1582, -1.2055])
    torch.testing.assert_close(returns_BT[1, :3], expected_T, rtol=0, atol=1e-4)


def test_second_golden(second_golden: Any) -> None:
    rewards_BT = torch.tensor([[-0.02, 0.01, 1.05], [-0.02, -9.98, 0.0]])
    advantages_BT, _ = gae(rewards_BT, second_golden.values_BT, second_golden.mask_BT, 1.0, 0.95)
    expected_BT = torch.tensor([[0.861375, 0.8225, 0.75], [-9.381, -10.38, 0.0]])
    torch.testing.assert_close(advantages_BT, expected_BT, rtol=0, atol=1e-5)


def test_discount_and_lambda_by_hand() -> None:
    # gamma .5, lambda .5. delta_1 = 2 - 4 = -2; delta_0 = 1 + .5 * 4 - 3 = 0;
    # A_0 = 0 + .25 * -2 = -.5.
    advantages_BT, returns_BT = gae(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.ones(1, 2), 0.5, 0.5
    )
    torch.testing.assert_close(advantages_BT, torch.tensor([[-0.5, -2.0]]))
    torch.testing.assert_close(returns_BT, torch.tensor([[2.5, 2.0]]))


def test_score_on_the_first_pad_needs_its_value_in_the_mask() -> None:
    # One response token, then the pad that bears score 2 and value .5; gamma = lambda = 1:
    # A_pad = 2 - .5 = 1.5, A_0 = (0 + .5 - 1) + 1.5 = 1.
    mask_BT = torch.tensor([[1, 0, 0]])
    rewards_BT = token_rewards(torch.tensor([2.0]), torch.zeros(1, 3), mask_BT, 0.1, "first_pad")
    values_mask_BT = mask_BT.bool() | score_position(mask_BT, "first_pad")
    advantages_BT, _ = gae(rewards_BT, torch.tensor([[1.0, 0.5, 9.0]]), values_mask_BT, 1.0, 1.0)
    torch.testing.assert_close(advantages_BT, torch.tensor([[1.0, 1.5, 0.0]]))


def gae_of_one_response(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> list[float]:
    """The definition: a double sum of discounted temporal differences, without recursion."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@settings(deadline=None, max_examples=60)
@given(
    mask=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    gamma=st.floats(0.5, 1.0),
    lam=st.floats(0.0, 1.0),
)
def test_gae_equals_the_definition_on_the_real_tokens_alone(
    mask: list[list[bool]], seed: int, gamma: float, lam: float
) -> None:
    mask_BT = torch.tensor(mask)
    generator = torch.Generator().manual_seed(seed)
    rewards_BT, values_BT = torch.randn(2, *mask_BT.shape, generator=generator)
    advantages_BT, returns_BT = gae(
        rewards_BT.masked_fill(~mask_BT, NAN),
        values_BT.masked_fill(~mask_BT, float("inf")),
        mask_BT,
        gamma,
        lam,
    )
    for row, real in enumerate(mask_BT):
        values = values_BT[row, real]
        expected = gae_of_one_response(rewards_BT[row, real].tolist(), values.tolist(), gamma, lam)
        torch.testing.assert_close(
            advantages_BT[row, real], torch.tensor(expected), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            returns_BT[row, real], torch.tensor(expected) + values, rtol=1e-4, atol=1e-5
        )
        assert (advantages_BT[row, ~real] == 0).all()
        assert (returns_BT[row, ~real] == 0).all()


def test_gae_leaves_its_inputs_alone() -> None:
    rewards_BT, values_BT = torch.ones(1, 3), torch.ones(1, 3)
    gae(rewards_BT, values_BT, torch.tensor([[1, 1, 0]]), 0.9, 0.9)
    assert torch.equal(rewards_BT, torch.ones(1, 3))
    assert torch.equal(values_BT, torch.ones(1, 3))


def test_reinforce_sums_discounted_rewards_to_come() -> None:
    # Row 1: 4, 2 + .5 * 4 = 4, 1 + .5 * 4 = 3. Row 2 ends after two tokens.
    rewards_BT = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, NAN]])
    returns_BT = reinforce(rewards_BT, torch.tensor([[1, 1, 1], [1, 1, 0]]), gamma=0.5)
    torch.testing.assert_close(returns_BT, torch.tensor([[3.0, 4.0, 4.0], [2.0, 2.0, 0.0]]))


def test_rloo_by_hand() -> None:
    # Group 1: 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2. Group 2 is all alike.
    scores_B = torch.tensor([1.0, 2.0, 6.0, 0.7, 0.7, 0.7])
    expected_B = torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0])
    torch.testing.assert_close(rloo(scores_B, group_size=3), expected_B)


def test_groups_whose_scores_differ_by_rounding_alone_are_equal() -> None:
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, 3e6, 3e6 + 1, 3e6, 3e6 + 4, 1e-7, 2e-7])
    assert equal_groups(scores.double(), 2) == [True, False, True, False, True]
    assert equal_groups(torch.tensor([NAN, 1.0, float("inf"), float("inf")]), 2) == [False, False]


def test_dr_grpo_leaves_the_deviation_out() -> None:
    scores = torch.tensor([1.0, 2.0, 6.0, 0.5, 0.5, 0.5])
    assert dr_grpo(scores, 3).tolist() == [-2.0, -1.0, 3.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(dr_grpo(scores, 3) * 3 / 2, rloo(scores, 3))
    rewards_BT, mask_BT = torch.tensor([[-0.5, 2.5], [1.0, 7.0]]), torch.tensor([[1, 1], [1, 0]])
    advantages_BT = resolve("dr_grpo")(rewards_BT, mask_BT, group_size=2)
    assert advantages_BT.tolist() == [[-3.0, -3.0], [3.0, 0.0]]


def test_grpo_by_hand() -> None:
    # Group 1: mean 3, unbiased variance (4 + 1 + 9) / 2 = 7. Group 2: mean 5, variance 4.
    scores_B = torch.tensor([1.0, 2.0, 6.0, 3.0, 5.0, 7.0])
    expected_B = torch.tensor([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, -1.0, 0.0, 1.0])
    torch.testing.assert_close(grpo(scores_B, group_size=3), expected_B)


@settings(deadline=None, max_examples=60)
@given(score=st.floats(-1e4, 1e4, width=32), group_size=st.integers(2, 9))
def test_equal_scores_give_no_advantage(score: float, group_size: int) -> None:
    scores_B = torch.full((2 * group_size,), score)
    for estimator in (rloo, grpo):
        advantages_B = estimator(scores_B, group_size)
        assert advantages_B.dtype == torch.float32
        assert advantages_B.abs().max() < 1e-3, estimator.__name__


@pytest.mark.parametrize("size", [1e-3, 1.0, -1000.0, 1e6])
@pytest.mark.parametrize("group_size", [2, 4])
def test_scores_apart_by_rounding_give_no_advantage_at_any_size(
    size: float, group_size: int
) -> None:
    # One unit in the last place of fp32, as another composition of the batch gives; then a
    # difference that fp32 resolves well.
    scores_B = torch.full((group_size,), size)
    scores_B[0] = torch.nextafter(scores_B[0], torch.tensor(0.0))
    assert torch.equal(grpo(scores_B, group_size), torch.zeros(group_size))
    real_B = scores_B.double()
    real_B[0] = size * 0.99
    expected = (group_size - 1) * group_size**-0.5 * -np.sign(size)
    assert grpo(real_B, group_size)[0].item() == pytest.approx(expected, rel=1e-2)


def test_a_score_that_cancels_is_compared_with_what_it_was_added_up_from() -> None:
    # 1000 less 1000, each with the rounding of fp32 at that size.
    scores_B, sizes_B = torch.tensor([6e-5, 0.0, 0.0, 0.0]), torch.full((4,), 2000.0)
    assert torch.equal(grpo(scores_B, 4, sizes_B), torch.zeros(4))
    assert grpo(scores_B, 4)[0] > 1


@pytest.mark.parametrize("score", [0.1, 0.01, 0.0])
def test_small_scores_of_a_model_apart_by_rounding_give_no_advantage(score: float) -> None:
    # A score of .1 is a sum of products of about 1, each with the rounding of its own size.
    scores_B = torch.full((4,), score)
    scores_B[0] -= 1.2e-7
    assert torch.equal(grpo(scores_B, 4), torch.zeros(4))
    scores_B[0] -= 1e-5
    assert grpo(scores_B, 4)[0].item() == pytest.approx(-1.5, rel=1e-2)


@pytest.mark.parametrize("estimator", [rloo, grpo])
def test_groups_must_divide_the_batch(estimator: Any) -> None:
    with pytest.raises(ValueError, match=r"\(5,\) do not divide into groups of 2"):
        estimator(torch.ones(5), 2)
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        estimator(torch.ones(4), 1)
    with pytest.raises(ValueError, match=r"\(2, 2\) do not divide"):
        estimator(torch.ones(2, 2), 2)


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"values_BT \(2,\)"):
        gae(torch.ones(2, 2), torch.ones(2), torch.ones(2, 2), 1.0, 1.0)


MASK_BT = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
# Sums 3, 1, -1, 1.
REWARDS_BT = torch.tensor([[0.5, 0.5, 2.0], [-1.0, 2.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
GIVEN = {"values_BT": torch.full((4, 3), 0.25), "group_size": 2, "gamma": 1.0, "lam": 0.95}


def test_rloo_spreads_the_difference_to_the_rest_of_the_group() -> None:
    # 3 against 1; -1 against 1.
    expected_BT = torch.tensor([[2.0, 2, 2], [-2, -2, 0], [-2, 0, 0], [2, 2, 2]])
    torch.testing.assert_close(resolve("rloo")(REWARDS_BT, MASK_BT, **GIVEN), expected_BT)


def test_grpo_spreads_the_normalised_reward() -> None:
    # Mean 2, unbiased deviation sqrt(2): (3 - 2) / sqrt(2) and so on.
    half = 2**-0.5
    expected_BT = torch.tensor([[half] * 3, [-half, -half, 0], [-half, 0, 0], [half] * 3])
    torch.testing.assert_close(resolve("grpo")(REWARDS_BT, MASK_BT, **GIVEN), expected_BT)


def test_a_score_behind_the_last_token_belongs_to_its_response() -> None:
    # The second row's 2 stands on padding.
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 1]])
    advantages_BT = resolve("rloo")(REWARDS_BT, mask_BT, **GIVEN)
    assert advantages_BT[1].tolist() == [-2, 0, 0]


def test_gae_and_reinforce_are_the_plain_functions() -> None:
    found_BT = resolve("gae")(REWARDS_BT, MASK_BT, **GIVEN)
    expected_BT, _ = gae(REWARDS_BT, GIVEN["values_BT"], MASK_BT, 1.0, 0.95)
    torch.testing.assert_close(found_BT, expected_BT)
    # Rewards to go of the first row: 3, 2.5, 2.
    to_go_BT = resolve("reinforce")(REWARDS_BT, MASK_BT, **GIVEN)
    assert to_go_BT[0].tolist() == [3, 2.5, 2]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_registry_of_estimators_agrees_with_their_functions(name: str) -> None:
    entry, estimator = ESTIMATORS[name], resolve(name)
    assert entry.needs_critic == estimator.needs_critic
    assert entry.needs_groups == ("group_size" in estimator.asks)
    assert entry.whitened == estimator.whitened


def test_a_function_gets_what_it_asks_for() -> None:
    def constant(rewards_BT: Tensor, mask_BT: Tensor, gamma: float, bonus: float = 2.0) -> Tensor:
        return torch.full(mask_BT.shape, gamma + bonus)

    known = describe(constant)
    assert known.asks == ("gamma",)
    assert not known.needs_critic
    assert known(REWARDS_BT, MASK_BT, **GIVEN)[1].tolist() == [3, 3, 0]


def test_a_function_that_cannot_be_served_is_refused() -> None:
    def curious(rewards_BT: Tensor, mask_BT: Tensor, weather: str) -> Tensor:
        return rewards_BT

    with pytest.raises(ValueError, match="takes 1 arguments by name; the first two are"):
        describe(lambda rewards_BT: rewards_BT)
    assert describe(lambda rewards_BT, mask_BT, *more, **named: rewards_BT).asks == ()
    with pytest.raises(ValueError, match="curious asks for weather; after rewards_BT and mask_BT"):
        describe(curious)

    def shapeless(rewards_BT: Tensor, mask_BT: Tensor) -> Tensor:
        return rewards_BT.sum(1)

    with pytest.raises(ValueError, match=r"shapeless returned \(4,\) for a batch of \(4, 3\)"):
        describe(shapeless)(REWARDS_BT, MASK_BT)
