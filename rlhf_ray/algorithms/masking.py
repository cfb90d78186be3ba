"""How every function of this package treats a mask: 1 (or True) on real tokens, any dtype.

Padding may hold anything, NaN and inf included: 0 * NaN is NaN, so padding is selected away
with `where`, never multiplied away.
"""

import torch
from torch import Tensor


def zero_padding(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in fp32 with exact zeros wherever `mask` is 0. Same shape; differentiable.

    No gradient reaches the masked positions.
    """
    return torch.where(mask.bool(), x.float(), 0.0)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` over the real tokens: fp32 scalar, 0 for an empty mask."""
    return zero_padding(x, mask).sum()


def count(mask: Tensor) -> Tensor:
    """Number of real tokens as an fp32 scalar, at least 1 so that it can divide."""
    return mask.bool().sum().clamp(min=1).float()


def require_same_shape(**tensors: Tensor | None) -> None:
    """Raises ValueError with every name and shape unless all the given tensors agree.

    Broadcasting would otherwise take a per-sample tensor for a per-token one in silence.
    """
    shapes = {name: tuple(x.shape) for name, x in tensors.items() if x is not None}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"tensors must have one shape, got {listed}")
