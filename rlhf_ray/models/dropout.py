"""Switching a model's own dropout off where its noise would be taken for signal."""

from typing import Any

from torch import nn


def without_dropout(model: Any) -> Any:
    """The model, its dropout set to 0 in place; what is attached later keeps its own."""
    for module in model.modules():
        attention: Any = module
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(attention, "attention_dropout", None), float):
            attention.attention_dropout = 0.0
    return model
