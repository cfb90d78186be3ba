import math

import pytest
import torch

from rlhf_ray.algorithms.correction import (
    Level,
    correction_metrics,
    mask_within,
    truncated_importance_weights,
)

NAN = float("nan")
# Learner over engine: row 0 has ratios 2, 1/4 and 1; row 1 has 4 and padding.
OLD = torch.tensor([[0.6, 0.1, 0.3], [0.8, NAN, NAN]]).log()
ROLLOUT = torch.tensor([[0.3, 0.4, 0.3], [0.2, NAN, NAN]]).log()
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


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


def test_a_response_has_the_product_of_its_ratios() -> None:
    weights = truncated_importance_weights(OLD, ROLLOUT, MASK, cap=3.0, level="sequence")
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.5], [3.0, 0.0, 0.0]]))


@pytest.mark.parametrize(
    ("level", "low", "high", "kept"),
    [
        ("token", 0.5, 2.5, [[1, 0, 1], [0, 0, 0]]),
        ("token", 0.0, 2.5, [[1, 1, 1], [0, 0, 0]]),
        ("token", 0.2, 5.0, [[1, 1, 1], [1, 0, 0]]),
        ("sequence", 0.6, 5.0, [[0, 0, 0], [1, 0, 0]]),
        ("sequence", 0.4, 3.0, [[1, 1, 1], [0, 0, 0]]),
        # The cube root of .5 is .79.
        ("geometric", 0.7, 3.0, [[1, 1, 1], [0, 0, 0]]),
        ("geometric", 0.8, 5.0, [[0, 0, 0], [1, 0, 0]]),
    ],
)
def test_masks_by_hand(level: Level, low: float, high: float, kept: list[list[int]]) -> None:
    found = mask_within(OLD, ROLLOUT, MASK, level, low, high)
    assert found.tolist() == torch.tensor(kept).bool().tolist()


def test_masked_weights_are_those_of_icepop_and_trl() -> None:
    """Their weight is the ratio within the bounds, and 0 outside of them; ours is capped there."""
    generator = torch.Generator().manual_seed(0)
    old, rollout = torch.randn(2, 4, 8, generator=generator)
    mask, ratio = torch.ones(4, 8), (old - rollout).exp()
    theirs = torch.where((ratio >= 0.5) & (ratio <= 5.0), ratio, 0.0)
    kept = mask_within(old, rollout, mask, "token", 0.5, 5.0)
    weights = truncated_importance_weights(old, rollout, mask, cap=5.0)
    assert 0 < kept.sum() < 32
    torch.testing.assert_close(weights * kept, theirs)


def test_a_token_that_the_learner_rules_out_is_left_out() -> None:
    never, zero, one = torch.full((1, 1), -math.inf), torch.zeros(1, 1), torch.ones(1, 1)
    for level in ("token", "sequence", "geometric"):
        assert not mask_within(never, zero, one, level, 0.1, 2.0).any()
        assert mask_within(never, zero, one, level, 0.0, 2.0).all()
        assert not mask_within(-never, zero, one, level, 0.0, 2.0).any()


def test_the_effective_sample_size_by_hand() -> None:
    weights = torch.tensor([[1.0, 2.0, 3.0], [2.0, 0.0, 0.0]])
    kept = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    assert correction_metrics(weights, kept, MASK) == {
        "sampler/weight_mean": pytest.approx(5 / 4),
        "sampler/masked_share": pytest.approx(1 / 4),
        "sampler/ess_share": pytest.approx(25 / 9 / 4),
    }
    nothing = correction_metrics(weights, torch.zeros_like(kept), MASK)
    assert nothing == {
        "sampler/weight_mean": 0,
        "sampler/masked_share": 1,
        "sampler/ess_share": 0,
    }


def test_bad_arguments_are_named() -> None:
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="cap must be above 0, got 0"):
        truncated_importance_weights(ones, ones, ones, cap=0)
    with pytest.raises(ValueError, match=r"rollout_logprobs \(1,\)"):
        truncated_importance_weights(ones, ones[0], ones, cap=2)
