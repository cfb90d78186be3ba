import math

import pytest
import torch

from rlhf_ray.algorithms.correction import truncated_importance_weights

NAN = float("nan")


def test_weights_by_hand() -> None:
    # Learner over engine: .6/.3 = 2, .3/.6 = .5, .9/.1 = 9 (cut to 3), equal = 1, padding 0.
    old = torch.tensor([[0.6, 0.3, 0.9, 0.4, NAN]]).log().requires_grad_()
    rollout = torch.tensor([[0.3, 0.6, 0.1, 0.4, 0.0]]).log()
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    weights = truncated_importance_weights(old, rollout, mask, cap=3.0)
    torch.testing.assert_close(weights, torch.tensor([[2.0, 0.5, 3.0, 1.0, 0.0]]))
    assert not weights.requires_grad


def test_truncation_never_raises_the_mean_above_one() -> None:
    # Untruncated, the mean weight under the sampler is 1: .25 * 3 + .75 * 1/3; cut to 2: .75.
    learner, engine = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.25, 0.75]])
    for cap, mean in ((math.inf, 1.0), (2.0, 0.75)):
        weights = truncated_importance_weights(learner.log(), engine.log(), torch.ones(1, 2), cap)
        assert (engine * weights).sum().item() == pytest.approx(mean, abs=1e-6)


def test_a_huge_gap_is_cut_to_the_cap() -> None:
    weights = truncated_importance_weights(
        torch.zeros(1, 1), torch.full((1, 1), -1e4), torch.ones(1, 1), cap=2.0
    )
    assert weights.item() == 2


def test_bad_arguments_are_named() -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="cap must be above 0, got 0"):
        truncated_importance_weights(ones, ones, ones, cap=0)
    with pytest.raises(ValueError, match=r"rollout_logprobs \(1,\)"):
        truncated_importance_weights(ones, ones[0], ones, cap=2)
