from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.rewards import score_position, token_rewards

NAN = float("nan")


def test_golden(golden: Any) -> None:
    # Row 1: -.2 * (.1, -.5, .4, -.5) = -.02, .1, -.08, .1, and 1 at the end.
    # Row 2: -.2 * (0, -.2, .3) = 0, .04, -.06, and -.5 at the last *real* token.
    kl_BT = kl_estimate(golden.logprobs_BT, golden.ref_logprobs_BT, "k1")
    kl_BT[1, 3] = NAN
    rewards_BT = token_rewards(golden.scores_B, kl_BT, golden.mask_BT, kl_coef=0.2)
    expected_BT = torch.tensor([[-0.02, 0.1, -0.08, 1.1], [0.0, 0.04, -0.56, 0.0]])
    torch.testing.assert_close(rewards_BT, expected_BT, rtol=0, atol=1e-6)


def test_second_golden(second_golden: Any) -> None:
    kl_BT = kl_estimate(second_golden.logprobs_BT, second_golden.ref_logprobs_BT, "k1")
    rewards_BT = token_rewards(second_golden.scores_B, kl_BT, second_golden.mask_BT, kl_coef=0.1)
    expected_BT = torch.tensor([[-0.02, 0.01, 1.05], [-0.02, -9.98, 0.0]])
    torch.testing.assert_close(rewards_BT, expected_BT, rtol=0, atol=1e-5)


def test_score_positions() -> None:
    # Full row; padded row; gap inside (the end counts, not the number of tokens); no token.
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    last_BT = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    first_pad_BT = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    assert torch.equal(score_position(mask_BT, "last_token"), last_BT.bool())
    assert torch.equal(score_position(mask_BT, "first_pad"), first_pad_BT.bool())


def test_first_pad_reward_lands_outside_the_mask() -> None:
    mask_BT = torch.tensor([[1, 1, 0], [1, 1, 1]])
    kl_BT = torch.tensor([[0.5, 1.0, NAN], [0.5, 1.0, 1.5]])
    rewards_BT = token_rewards(torch.tensor([2.0, 3.0]), kl_BT, mask_BT, 0.1, "first_pad")
    expected_BT = torch.tensor([[-0.05, -0.1, 2.0], [-0.05, -0.1, 2.85]])
    torch.testing.assert_close(rewards_BT, expected_BT)


def test_a_row_without_tokens_gets_no_score_even_if_it_is_nan() -> None:
    rewards_BT = token_rewards(
        torch.tensor([NAN, 1.0]), torch.full((2, 2), NAN), torch.tensor([[0, 0], [0, 0]]), 0.1
    )
    assert torch.equal(rewards_BT, torch.zeros(2, 2))


def test_a_response_batch_without_columns_is_left_empty() -> None:
    empty = torch.zeros(2, 0)
    for position in ("last_token", "first_pad"):
        assert token_rewards(torch.ones(2), empty, empty, 0.1, position).shape == (2, 0)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
    position=st.sampled_from(["last_token", "first_pad"]),
)
def test_rewards_add_up_to_score_minus_penalty(
    lengths: list[int], seed: int, position: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.arange(7) < torch.tensor(lengths)[:, None]
    kl_BT = torch.randn(len(lengths), 7, generator=generator)
    scores_B = torch.randn(len(lengths), generator=generator)
    rewards_BT = token_rewards(scores_B, kl_BT, mask_BT, 0.3, position)
    for row, length in enumerate(lengths):
        expected = (scores_B[row] if length else 0.0) - 0.3 * kl_BT[row, :length].sum()
        torch.testing.assert_close(rewards_BT[row].sum(), torch.as_tensor(expected))


def test_unknown_position_names_the_known_ones() -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="last_token or first_pad, got 'eos'"):
        token_rewards(torch.ones(1), ones, ones, 0.1, "eos")  # pyright: ignore[reportArgumentType]


def test_scores_must_be_one_per_row() -> None:
    ones = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"scores_B \(2, 1\).*mask_BT \(2, 2\)"):
        token_rewards(torch.ones(2, 1), ones, ones, 0.1)
    with pytest.raises(ValueError, match="one shape"):
        token_rewards(torch.ones(2), torch.ones(2, 3), ones, 0.1)
