"""Tests of gspo and cispo: worked out by hand, and against the peers' formulas."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_ray.algorithms.policy_losses import cispo_loss, gspo_loss, policy_loss

NAN = math.nan


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs that carry the gradient, old ones, advantages of each row, and a mask."""
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(6, 7, generator=generator)
    old = logprobs + 0.3 * torch.randn(6, 7, generator=generator)
    advantages = torch.randn(6, 1, generator=generator).expand(6, 7)
    mask = (torch.arange(7) < torch.tensor([7, 1, 3, 2, 5, 4])[:, None]).int()
    return logprobs.requires_grad_(), old, advantages, mask


def test_gspo_has_one_ratio_for_a_response() -> None:
    # Row 0: log-ratios ln 2 and 0, so s = sqrt 2 on both tokens, clipped to 1.2 where A > 0.
    logprobs = torch.tensor([[math.log(2), 0.0], [math.log(0.25), NAN]], requires_grad=True)
    old, mask = torch.zeros(2, 2), torch.tensor([[1, 1], [1, 0]])
    loss, stats = gspo_loss(logprobs, old, torch.tensor([[1.0, 1.0], [2.0, NAN]]), mask)
    loss.backward()
    assert loss.item() == pytest.approx(-(1.2 + 1.2 + 2 * 0.25) / 3)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 0.0], [-0.5 / 3, 0.0]]))
    assert stats["clipfrac"].item() == pytest.approx(2 / 3)
    # The statistics are of the tokens' ratios: 2, 1 and 1/4.
    assert stats["ratio"].item() == pytest.approx(3.25 / 3)
    assert stats["ratio_max"].item() == pytest.approx(2)
    # Where A < 0 nothing bounds a ratio from above but the dual clip.
    bad = torch.full((2, 2), -1.0)
    assert gspo_loss(logprobs[:1], old[:1], bad[:1], mask[:1])[0].item() == pytest.approx(2**0.5)
    bounded = gspo_loss(logprobs[:1], old[:1], bad[:1], mask[:1], dual_clip=1.3)[0]
    assert bounded.item() == pytest.approx(1.3)


def test_gspo_of_responses_of_one_token_is_the_clipped_loss() -> None:
    logprobs, old, advantages, _ = batch()
    one = torch.zeros(6, 7).index_fill(1, torch.tensor([0]), 1)
    ours, theirs = (f(logprobs, old, advantages, one) for f in (gspo_loss, policy_loss))
    assert ours == theirs


def test_gspo_agrees_with_the_sequence_form_of_its_paper() -> None:
    """Mean over responses of -min(s A, clip(s) A), with s differentiated, by sequence_mean."""
    logprobs, old, advantages, mask = batch()
    lengths = mask.sum(1)
    s = (((logprobs - old) * mask).sum(1) / lengths).exp()
    advantage = advantages[:, 0]
    theirs = -torch.minimum(s * advantage, s.clamp(0.9, 1.1) * advantage).mean()
    weights = mask.sum() / (6 * lengths[:, None]) * mask
    ours, _ = gspo_loss(logprobs, old, advantages, mask, 0.1, 0.1, weights=weights)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_cispo_keeps_the_gradient_of_every_token() -> None:
    # Ratios 2 and 1/4, both outside [.8, 1.2]: weights 1.2 and .8, whatever the sign of A.
    logprobs = torch.tensor([[math.log(2), math.log(0.25), NAN]], requires_grad=True)
    old, mask = torch.zeros(1, 3), torch.tensor([[1, 1, 0]])
    loss, stats = cispo_loss(logprobs, old, torch.tensor([[1.0, -3.0, NAN]]), mask)
    loss.backward()
    assert loss.item() == pytest.approx((-1.2 + 3 * 0.8) / 2)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-0.6, 1.2, 0.0]]))
    assert stats["clipfrac"] == 1
    free, _ = cispo_loss(logprobs, old, torch.ones(1, 3), mask, clip_low=1.0, clip_high=4.0)
    assert free.item() == pytest.approx(-(2 + 0.25) / 2), "no lower bound, an upper one of 5"
    with pytest.raises(ValueError, match=r"dual_clip 3\.0 has no effect"):
        cispo_loss(logprobs, old, old, mask, dual_clip=3.0)


def test_cispo_has_the_gradient_of_its_papers_form() -> None:
    """A mean over tokens of -sg(clip(ratio)) A logprob, as in TRL and verl."""
    logprobs, old, advantages, mask = batch()
    clipped = (logprobs - old).exp().clamp(max=1.1).detach()
    theirs = -(clipped * advantages * logprobs * mask).sum() / mask.sum()
    ours, _ = cispo_loss(logprobs, old, advantages, mask, clip_low=1.0, clip_high=0.1)
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("loss_of", [policy_loss, gspo_loss, cispo_loss])
@pytest.mark.parametrize("log_ratio", [500.0, -500.0])
def test_a_runaway_ratio_leaves_every_loss_finite(loss_of: object, log_ratio: float) -> None:
    logprobs = torch.tensor([[log_ratio]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    for advantage in (one, -one):
        loss, _ = loss_of(logprobs, zero, advantage, one)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss.isfinite()
        assert gradient.isfinite()
