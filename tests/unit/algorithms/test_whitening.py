import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algorithms.whitening import (
    Moments,
    count,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    require_same_shape,
    whiten,
    zero_padding,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_padding_becomes_exact_zero_whatever_it_and_the_mask_hold(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.5, NAN, -2.0], [INF, -INF, 3.0]])
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=dtype)
    torch.testing.assert_close(
        zero_padding(x, mask), torch.tensor([[1.5, 0.0, -2.0], [0.0, 0.0, 3.0]]), rtol=0, atol=0
    )
    assert masked_sum(x, mask).item() == 2.5
    assert count(mask).item() == 3


def test_half_precision_comes_back_as_fp32() -> None:
    assert zero_padding(torch.ones(2, dtype=torch.bfloat16), torch.ones(2)).dtype == torch.float32


def test_count_of_nothing_can_still_divide() -> None:
    assert count(torch.zeros(2, 3)).item() == 1


def test_shapes_that_differ_are_named() -> None:
    require_same_shape(x=torch.ones(2, 3), mask=torch.ones(2, 3), weights=None)
    with pytest.raises(ValueError, match=r"x \(3,\), mask \(3, 3\)"):
        require_same_shape(x=torch.ones(3), mask=torch.ones(3, 3), weights=None)


NAN = float("nan")


def test_mean_and_variance_by_hand() -> None:
    # Real: 1, 2, 6. Mean 3; squares 4 + 1 + 9 = 14, over 2 or over 3.
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, float("inf"), -1e30]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_mean(x, mask).item() == pytest.approx(3)
    assert masked_var(x, mask).item() == pytest.approx(7)
    assert masked_var(x, mask, unbiased=False).item() == pytest.approx(14 / 3)


def test_golden_advantages(golden: Any) -> None:
    returns_BT = torch.tensor([[0.9882125, 1.05075, 0.985, 1.1], [-0.4819, -0.502, -0.56, 0.0]])
    whitened_BT = masked_whiten(returns_BT - golden.values_BT, golden.mask_BT)
    expected_BT = torch.tensor(
        [[0.961777, 0.903629, 0.646356, 0.669639], [-1.164877, -1.040858, -0.975666, 0.0]]
    )
    torch.testing.assert_close(whitened_BT, expected_BT, rtol=0, atol=3e-5)
    assert whitened_BT[1, 3] == 0


def test_second_golden_uses_the_population_variance(second_golden: Any) -> None:
    advantages_BT = torch.tensor([[0.861375, 0.8225, 0.75], [-9.381, -10.38, 0.0]])
    whitened_BT = masked_whiten(advantages_BT, second_golden.mask_BT, unbiased=False)
    expected_BT = torch.tensor([[0.824541, 0.817133, 0.803316], [-1.127307, -1.317683, 0.0]])
    torch.testing.assert_close(whitened_BT, expected_BT, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("unbiased", "first"), [(False, 0.0508), (True, 0.1394)])
def test_kept_mean_golden(unbiased: bool, first: float) -> None:
    # 1.2, 1.3 ... 2.0: mean 1.6, sum of squares .6, so std = sqrt(.6/9) or sqrt(.6/8):
    # 1.6 - .4 / .258199 = .0508, 1.6 - .4 / .273861 = .1394.
    rewards = torch.arange(12, 21) / 10
    whitened = masked_whiten(rewards, torch.ones(9), shift_mean=False, unbiased=unbiased)
    assert whitened[0].item() == pytest.approx(first, abs=1e-4)
    assert whitened.mean().item() == pytest.approx(1.6, abs=1e-5)


def test_kept_mean_does_not_enter_the_padding() -> None:
    mask = torch.tensor([1, 1, 0])
    whitened = masked_whiten(torch.tensor([4.0, 6.0, NAN]), mask, shift_mean=False)
    # Mean 5, unbiased std sqrt(2).
    torch.testing.assert_close(whitened, torch.tensor([5 - 0.5**0.5, 5 + 0.5**0.5, 0.0]))


def test_epsilon_sits_under_the_root() -> None:
    # Variance 2e-8 (unbiased): 1e-4 / sqrt(2e-8 + 1e-8); added to the deviation instead it would
    # be 1e-4 / (1.41e-4 + 1e-8).
    whitened = masked_whiten(torch.tensor([-1e-4, 1e-4]), torch.ones(2))
    assert whitened[1].item() == pytest.approx(1e-4 / math.sqrt(3e-8), rel=1e-4)


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
def test_rounding_is_not_whitened_to_order_one(size: float) -> None:
    x = torch.full((6,), size)
    x[0] = torch.nextafter(x[0], torch.tensor(math.inf))
    mask = torch.ones(6)
    moments = Moments.of(x, mask)
    for whitened in (masked_whiten(x, mask), whiten(x, mask, moments.mean, moments.std())):
        assert torch.equal(whitened, torch.zeros(6))
    assert torch.allclose(masked_whiten(x, mask, shift_mean=False), x)
    x[0] = size * 1.1  # a real difference: one value against five equal ones
    assert masked_whiten(x, mask)[0].item() == pytest.approx(5 / 6**0.5, rel=1e-3)


def test_differences_of_large_numbers_are_rounding_at_those_numbers_size() -> None:
    moments = Moments.of(torch.tensor([6e-5, -6e-5]), torch.ones(2))  # of 1000 less 1000
    assert moments.std(size=1000.0) == 0.0
    assert moments.std() == pytest.approx(6e-5 * 2**0.5)


def test_a_deviation_that_is_not_finite_does_not_become_a_plain_zero() -> None:
    assert whiten(torch.ones(2), torch.ones(2), 0.0, NAN).isnan().all()
    assert masked_whiten(torch.tensor([NAN, 1.0]), torch.ones(2)).isnan().all()
    assert math.isnan(Moments(2.0, NAN, NAN).std())


@pytest.mark.parametrize("num_real", [0, 1])
def test_too_few_tokens_stay_finite(num_real: int) -> None:
    x = torch.tensor([5.0, NAN, NAN])
    mask = torch.arange(3) < num_real
    assert masked_mean(x, mask).item() == 5.0 * num_real
    assert masked_var(x, mask).item() == 0
    assert torch.equal(masked_whiten(x, mask), torch.zeros(3))
    moments = Moments.of(x, mask)
    assert (moments.mean, moments.std()) == (5.0 * num_real, 0.0)


def test_nan_in_the_padding_reaches_no_gradient() -> None:
    x = torch.tensor([1.0, 2.0, NAN], requires_grad=True)
    mask = torch.tensor([1, 1, 0])
    (masked_mean(x, mask) + masked_var(x, mask) + masked_whiten(x, mask)[0]).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad[2] == 0
    # Whitening two points is constant, so mean (1/2) and variance 2 * (x - 1.5) / 1 remain.
    torch.testing.assert_close(x.grad[:2], torch.tensor([0.5 - 1.0, 0.5 + 1.0]))


def test_moments_golden() -> None:
    # Scores normalised by moments over iterations: 1, 2, 3, 4, then 10, 0.
    first = Moments.of(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4))
    assert first == Moments(count=4.0, total=10.0, total_sq=30.0)
    assert first.mean == 2.5
    assert first.std() == pytest.approx(1.290994, abs=1e-6)
    both = first + Moments.of(torch.tensor([10.0, 0.0]), torch.ones(2))
    assert both.mean == pytest.approx(3.333333, abs=1e-6)
    assert both.std() == pytest.approx(3.559026, abs=1e-6)
    # Squares 130 - 20^2/6 = 63.33, over 6.
    assert both.std(unbiased=False) == pytest.approx(math.sqrt(130 / 6 - (20 / 6) ** 2))


def test_moments_do_not_lose_the_digits_that_fp32_would() -> None:
    # In fp32, 1e4^2 has a spacing of 8: the variance of 1 would be lost in sums of squares.
    x = 1e4 + torch.tensor([-1.0, 1.0]).repeat(5000)
    assert Moments.of(x, torch.ones_like(x)).std(unbiased=False) == pytest.approx(1.0, rel=1e-6)


@settings(deadline=None, max_examples=50)
@given(
    part_lengths=st.lists(st.integers(0, 8), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    unbiased=st.booleans(),
    shift_mean=st.booleans(),
)
def test_summed_moments_whiten_parts_as_one_batch(
    part_lengths: list[int], seed: int, unbiased: bool, shift_mean: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for length in part_lengths:
        mask = torch.rand(length, generator=generator) < 0.7
        x = 3 + 2 * torch.randn(length, generator=generator)
        parts.append((x.masked_fill(~mask, NAN), mask))
    total = sum((Moments.of(x, mask) for x, mask in parts), Moments())
    std = total.std(unbiased)
    spread = torch.cat([whiten(x, mask, total.mean, std, shift_mean) for x, mask in parts])
    xs, masks = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    expected = masked_whiten(xs, masks, shift_mean, unbiased)
    torch.testing.assert_close(spread, expected, rtol=1e-4, atol=1e-4)


def test_shapes_must_agree() -> None:
    for function in (masked_mean, masked_var, masked_whiten, Moments.of):
        with pytest.raises(ValueError, match=r"x \(3,\), mask \(2, 3\)"):
            function(torch.ones(3), torch.ones(2, 3))
