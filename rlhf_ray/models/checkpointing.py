"""Gradient checkpointing of a model whose dropout is off."""

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_ray.errors import ConfigError


def recompute_activations(model: Any) -> Any:
    """Make the blocks of a model in evaluation mode recompute their activations in the backward.

    transformers does so in blocks that are in training mode alone. The blocks are put into it, the
    layers inside are not, so that dropout stays off.

    Raises:
        ConfigError: the architecture cannot, or its blocks themselves drop values.
    """
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks or any(_drops(block) for block in blocks):
        raise ConfigError(
            f"{name} cannot recompute activations with its dropout off; set "
            "policy.gradient_checkpointing and critic.gradient_checkpointing to false"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in blocks:
        block.training = True
    return model


def _drops(block: Any) -> bool:
    """Whether a block applies dropout by its own training mode."""
    rates = (value for name, value in vars(block).items() if "dropout" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)
