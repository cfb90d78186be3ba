import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms import advantages
from rlhf_ray.algorithms.estimators import ESTIMATORS, describe
from rlhf_ray.config.ppo import WITHOUT_CRITIC

MASK_BT = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
# Sums 3, 1, -1, 1.
REWARDS_BT = torch.tensor([[0.5, 0.5, 2.0], [-1.0, 2.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
GIVEN = {"values_BT": torch.full((4, 3), 0.25), "group_size": 2, "gamma": 1.0, "lam": 0.95}


def test_rloo_spreads_the_difference_to_the_rest_of_the_group() -> None:
    # 3 against 1; -1 against 1.
    expected_BT = torch.tensor([[2.0, 2, 2], [-2, -2, 0], [-2, 0, 0], [2, 2, 2]])
    torch.testing.assert_close(ESTIMATORS["rloo"](REWARDS_BT, MASK_BT, **GIVEN), expected_BT)


def test_grpo_spreads_the_normalised_reward() -> None:
    # Mean 2, unbiased deviation sqrt(2): (3 - 2) / sqrt(2) and so on.
    half = 2**-0.5
    expected_BT = torch.tensor([[half] * 3, [-half, -half, 0], [-half, 0, 0], [half] * 3])
    torch.testing.assert_close(ESTIMATORS["grpo"](REWARDS_BT, MASK_BT, **GIVEN), expected_BT)


def test_a_score_behind_the_last_token_belongs_to_its_response() -> None:
    # The second row's 2 stands on padding.
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 1, 1]])
    advantages_BT = ESTIMATORS["rloo"](REWARDS_BT, mask_BT, **GIVEN)
    assert advantages_BT[1].tolist() == [-2, 0, 0]


def test_gae_and_reinforce_are_the_plain_functions() -> None:
    found_BT = ESTIMATORS["gae"](REWARDS_BT, MASK_BT, **GIVEN)
    expected_BT, _ = advantages.gae(REWARDS_BT, GIVEN["values_BT"], MASK_BT, 1.0, 0.95)
    torch.testing.assert_close(found_BT, expected_BT)
    # Rewards to go of the first row: 3, 2.5, 2.
    to_go_BT = ESTIMATORS["reinforce"](REWARDS_BT, MASK_BT, **GIVEN)
    assert to_go_BT[0].tolist() == [3, 2.5, 2]


def test_who_needs_a_critic_and_who_is_whitened() -> None:
    assert [name for name, known in ESTIMATORS.items() if known.needs_critic] == ["gae"]
    assert {n for n, known in ESTIMATORS.items() if not known.needs_critic} == set(WITHOUT_CRITIC)
    assert [n for n, known in ESTIMATORS.items() if known.whitened] == ["gae", "reinforce"]


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
