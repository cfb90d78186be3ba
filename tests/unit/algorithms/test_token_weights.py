"""Tests of the means over tokens: worked out by hand, and against the peers' formulas."""

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.policy_losses import policy_loss
from rlhf_ray.algorithms.token_weights import Aggregation, aggregation_weights

MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
LOSSES = torch.tensor([[1.0, 2.0, 6.0, 99.0], [5.0, 99.0, 99.0, 99.0]])


def aggregated(losses: Tensor, mask: Tensor, kept: Tensor, how: Aggregation) -> float:
    """The mean over tokens, under the weights of another mean; max_tokens is 10."""
    weights = aggregation_weights(mask, kept, how, 10)
    return float((losses * weights).sum() / mask.sum())


@pytest.mark.parametrize(
    ("how", "by_hand"),
    [
        ("token_mean", 14 / 4),
        ("sequence_mean", (9 / 3 + 5) / 2),
        ("dr_grpo", 14 / (2 * 10)),
    ],
)
def test_means_by_hand(how: Aggregation, by_hand: float) -> None:
    assert aggregated(LOSSES, MASK, MASK, how) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("how", "one_token_less", "one_row_less"),
    [
        ("token_mean", (1 + 6 + 5) / 3, 9 / 3),
        ("sequence_mean", ((1 + 6) / 2 + 5) / 2, 9 / 3),
        ("dr_grpo", (1 + 6 + 5) / 20, 9 / 10),
    ],
)
def test_what_is_not_kept_counts_in_no_denominator(
    how: Aggregation, one_token_less: float, one_row_less: float
) -> None:
    without_token = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]])
    assert aggregated(LOSSES, MASK, without_token, how) == pytest.approx(one_token_less)
    without_row = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])  # padding is never kept
    assert aggregated(LOSSES, MASK, without_row, how) == pytest.approx(one_row_less)
    assert aggregated(LOSSES, MASK, torch.zeros_like(MASK), how) == 0


def test_means_agree_with_the_formulas_of_trl_and_verl() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(6, 7, generator=generator)
    lengths = torch.tensor([7, 1, 3, 2, 5, 4])
    mask = (torch.arange(7) < lengths[:, None]).int()
    per_row = (losses * mask).sum(1)
    # verl: token-mean, seq-mean-token-mean, seq-mean-token-sum-norm; TRL: dapo, grpo, dr_grpo
    theirs = {
        "token_mean": per_row.sum() / mask.sum(),
        "sequence_mean": (per_row / mask.sum(1)).mean(),
        "dr_grpo": per_row.sum() / (len(losses) * 10),
    }
    for how, expected in theirs.items():
        ours = aggregated(losses, mask, mask, how)  # type: ignore[arg-type]
        assert ours == pytest.approx(float(expected), rel=1e-5)


def test_the_mean_over_tokens_weighs_each_exactly_one() -> None:
    mask = torch.ones(7, 7)
    assert torch.equal(aggregation_weights(mask, mask, "token_mean", 10), mask)


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "dr_grpo"])
def test_micro_batches_of_a_mini_batch_add_up(how: Aggregation) -> None:
    """A loss divides by the mini-batch's tokens; each part brings its own rows' weights."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.randn(6, 7, generator=generator).requires_grad_()
    advantages = torch.randn(6, 7, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 2, 5, 4])[:, None]
    weights = aggregation_weights(mask, mask, how, 10)

    def gradient(parts: list[slice]) -> Tensor:
        losses = [
            policy_loss(
                logprobs[part],
                logprobs[part].detach() + 0.1,
                advantages[part],
                mask[part],
                weights=weights[part],
                num_tokens=mask.sum(),
            )[0]
            for part in parts
        ]
        return torch.autograd.grad(torch.stack(losses).sum(), logprobs)[0]

    whole = gradient([slice(0, 6)])
    torch.testing.assert_close(gradient([slice(0, 1), slice(1, 4), slice(4, 6)]), whole)
