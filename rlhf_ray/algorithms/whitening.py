"""Masked means, variances and whitening, in one process or over several.

A mask is 1 (or True) on real tokens, of any dtype. Padding may hold anything, NaN and inf
included: 0 * NaN is NaN, so padding is selected away with `where`, never multiplied away.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Return `x` in fp32 with exact zeros wherever `mask` is 0. Same shape; differentiable.

    No gradient reaches the masked positions.
    """
    return torch.where(mask.bool(), x.float(), 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of `x` over the real tokens: fp32 scalar, 0 for an empty mask."""
    return zero_padding(x, mask).sum()


def count(mask: Tensor) -> Tensor:
    """Return the number of real tokens as an fp32 scalar, at least 1 so that it can divide."""
    return mask.bool().sum().clamp(min=1).float()


def require_same_shape(**tensors: Tensor | None) -> None:
    """Raise ValueError with every name and shape unless all the given tensors have one shape.

    Broadcasting would otherwise silently accept a per-sample tensor for a per-token one.
    """
    shapes = {name: tuple(x.shape) for name, x in tensors.items() if x is not None}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"tensors must have one shape, got {listed}")


ROUNDING = 1e-6
"""A spread below this share of the values' size is rounding, of fp32 (1.2e-7) or of sums of
squares. Divided by itself, it would become noise of order one; so it counts as no spread."""

EPS = 1e-8
"""Added to the variance, in squared units of the data, before the inverse square root."""


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `x` over the real tokens: fp32 scalar, differentiable, 0 without any."""
    require_same_shape(x=x, mask=mask)
    return masked_sum(x, mask) / count(mask)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Return the variance of `x` over the n real tokens: fp32 scalar, differentiable.

    Divides by n - 1 (Bessel's correction) if `unbiased`, else by n. Fewer than two real tokens
    have variance 0.
    """
    n = count(mask)
    squares = (zero_padding(x, mask) - masked_mean(x, mask)).square()
    return masked_sum(squares, mask) / ((n - 1).clamp(min=1) if unbiased else n)


def masked_whiten(
    x: Tensor, mask: Tensor, shift_mean: bool = True, unbiased: bool = True
) -> Tensor:
    """Scale `x` to variance 1 over the real tokens; remove its mean, or keep it (not `shift_mean`).

        (x - mean) / sqrt(var + 1e-8)  [+ mean]

    Values that differ by rounding alone become 0 [+ mean].

    Args:
        x: any shape.
        mask: 1 on real tokens, same shape.
        shift_mean: True for advantages; False for rewards, whose sign must survive.
        unbiased: which variance, see `masked_var`.

    Returns:
        fp32, shape of `x`, 0 on padding (also where the mean is kept).
    """
    std = masked_var(x, mask, unbiased).sqrt()
    is_rounding = (std <= ROUNDING * zero_padding(x, mask).abs()).any()
    return whiten(x, mask, masked_mean(x, mask), torch.where(is_rounding, 0.0, std), shift_mean)


def whiten(
    x: Tensor, mask: Tensor, mean: Tensor | float, std: Tensor | float, shift_mean: bool = True
) -> Tensor:
    """Whiten as `masked_whiten` does, with a given mean and standard deviation; 0: no spread.

    With those of summed `Moments`, a batch spread over processes is whitened as a whole:

        total = sum((Moments.of(x, mask) for x, mask in parts), Moments())
        parts = [whiten(x, mask, total.mean, total.std()) for x, mask in parts]
    """
    require_same_shape(x=x, mask=mask)
    std = torch.as_tensor(std, dtype=torch.float32, device=x.device)
    scale = torch.where(std == 0, 0.0, torch.rsqrt(std.square() + EPS))
    whitened = (zero_padding(x, mask) - mean) * scale
    return zero_padding(whitened if shift_mean else whitened + mean, mask)


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of a batch that may be spread over processes.

    `Moments()` is the empty batch. Python floats (float64), because sums of squares over a large
    batch lose digits in fp32.
    """

    count: float = 0.0
    """Number of real tokens."""
    total: float = 0.0
    """Sum over them, in the data's unit."""
    total_sq: float = 0.0
    """Sum of squares over them, in the data's unit squared."""

    @classmethod
    def of(cls, x: Tensor, mask: Tensor) -> "Moments":
        """Return the moments of the real tokens of `x` (any shape; padding may hold anything)."""
        require_same_shape(x=x, mask=mask)
        real = x[mask.bool()].double()
        return cls(float(real.numel()), real.sum().item(), real.square().sum().item())

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.count + other.count, self.total + other.total, self.total_sq + other.total_sq
        )

    @property
    def mean(self) -> float:
        """Mean in the data's unit; 0 without tokens."""
        return self.total / max(self.count, 1.0)

    def std(self, unbiased: bool = True, size: float = 0.0) -> float:
        """Return the standard deviation in the data's unit; 0 if it is rounding.

        Args:
            unbiased: as for `masked_var`.
            size: of the numbers whose differences the values are, where it is larger than theirs.
        """
        squares = max(self.total_sq - self.total * self.mean, 0.0)
        std = math.sqrt(squares / max(self.count - 1.0 if unbiased else self.count, 1.0))
        return 0.0 if std <= ROUNDING * max(abs(self.mean), size) else std
