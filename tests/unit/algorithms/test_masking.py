import pytest
import torch

from rlhf_ray.algorithms.masking import count, masked_sum, require_same_shape, zero_padding

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
