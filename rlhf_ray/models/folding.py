"""Folding an adapter into the base that it stands on, in memory."""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rlhf_ray.errors import DataError


@torch.no_grad()
def fold(model: PeftModel) -> tuple[Any, float]:
    """The base with its adapter folded in, and a trained head (SEQ_CLS) in place of its own.

    Each weight is computed in fp32 as ``W + scale * B @ A`` and rounded once to its data type.

    Returns:
        The transformers model, and the share of the changed weights (delta not 0) whose stored
        value differs from the base's: 1 when nothing was lost to rounding, and 1 when the adapter
        changes nothing.

    Raises:
        DataError: the base is quantised.
    """
    num_changed = num_survived = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        weight: Tensor = module.get_base_layer().weight  # type: ignore[assignment,operator]
        if not weight.is_floating_point():
            raise DataError(
                "An adapter cannot be folded into a quantised base: merge it into its base on disk "
                "(command merge) and name the result, or set model.quantization=none"
            )
        before = weight.detach().clone()
        delta: Tensor = module.get_delta_weight("default").float()  # type: ignore[operator]
        weight.copy_(before.float() + delta)
        num_changed += int((delta != 0).sum())
        num_survived += int(((weight != before) & (delta != 0)).sum())
    survived = num_survived / num_changed if num_changed else 1.0
    return model.unload(), survived  # type: ignore[operator]
