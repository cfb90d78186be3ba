"""Prepare a model for training: which parameters train, and what happens to the others.

Also counts the parameters, switches dropout off, and recomputes activations in the backward pass.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TypeVar

from peft import prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.adapters import Model, unwrapped

ModelT = TypeVar("ModelT", bound=Model)

_ATTENTION_RATE = "attention_dropout"
"""Attention layers pass this attribute to a function; no nn.Dropout carries the rate."""
_PEFT_NAMES = ("base_layer", "modules_to_save", "original_module", "lora_")
"""How the submodules begin that PEFT adds to a module that it wraps."""


def train_only(model: Model, prefixes: Sequence[str], key: str) -> None:
    """Freeze every module whose name begins with none of the prefixes, in place.

    Weights that two modules share are trained if either module is.

    Raises:
        ConfigError: a prefix matches no parameter of the model.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    trained = []
    for prefix in prefixes:
        matches = [p for name, p in named if f"{name}.".startswith(f"{prefix}.")]
        if not matches:
            raise ConfigError(_unknown_module(prefix, [name for name, _ in named], key))
        trained += matches
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def _unknown_module(prefix: str, names: Sequence[str], key: str) -> str:
    known = {
        module for name in names for module in accumulate(name.split("."), lambda a, b: f"{a}.{b}")
    }
    near = difflib.get_close_matches(prefix, sorted(known), n=4)
    roots = sorted({name.split(".")[0] for name in names})
    hint = f"did you mean {', '.join(near)}" if near else f"names begin with {' or '.join(roots)}"
    return f"{key}: no module of the model is named {prefix!r}; {hint}"


def prepare_for_adapter(model: ModelT, settings: ModelConfig) -> ModelT:
    """Prepare a base for an adapter that a supervised stage trains.

    A quantised base gets its unquantised parts (norms, embeddings) in fp32. An unquantised base is
    left alone: fp32 copies would double its memory and add log-prob mismatch with the engine.
    """
    if settings.quantization == "none":
        return model
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def without_dropout(model: ModelT) -> ModelT:
    """Set a model's dropout to 0, in place; an adapter attached later keeps its own rate.

    For stages whose signal dropout noise would drown, such as log-prob differences.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, _ATTENTION_RATE, None), float):
            setattr(module, _ATTENTION_RATE, 0.0)
    return model


def recompute_activations(model: ModelT) -> ModelT:
    """Turn gradient checkpointing on in a model that stays in evaluation mode.

    transformers checkpoints only blocks in training mode. So the blocks are put into training
    mode, but not the layers inside them, whose dropout stays off.

    Raises:
        ConfigError: the architecture has no checkpointed blocks, or its blocks apply dropout
            themselves.
    """
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not blocks or any(_applies_dropout(block) for block in blocks):
        raise ConfigError(
            f"{type(unwrapped(model)).__name__} cannot recompute activations with its dropout off; "
            "set policy.gradient_checkpointing and critic.gradient_checkpointing to false"
        )
    # Reentrant checkpointing loses the gradient where a block's input needs none (frozen base).
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in blocks:
        block.training = True
    return model


def _applies_dropout(block: nn.Module) -> bool:
    """Return whether a block calls ``functional.dropout`` itself, by its own training mode."""
    rates = (value for name, value in vars(block).items() if "dropout" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


@dataclass(frozen=True)
class ParameterGroup:
    """One module outside the blocks, or consecutive blocks with equal counts."""

    name: str
    """For example `transformer.wte`, `transformer.h.11`, `transformer.h.0-10`."""
    parameters: int
    """Number of parameters, frozen ones included."""
    trainable: int
    """Number of trained parameters."""


def parameter_groups(model: Model) -> list[ParameterGroup]:
    """Count parameters by group, in the order of the model; shared weights count once.

    Args:
        model: plain or wrapped by PEFT; 4-bit weights count as the weights they stand for.
    """
    sizes: dict[tuple[str, int | None], tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        total, trainable = sizes.get(_module(name), (0, 0))
        size = num_elements(parameter)
        sizes[_module(name)] = (total + size, trainable + size * parameter.requires_grad)
    groups = []
    for (stem, size), alike in groupby(sizes, key=lambda module: (module[0], sizes[module])):
        blocks = [index for _, index in alike]
        total, trainable = (count * len(blocks) for count in size)
        groups.append(ParameterGroup(_group_name(stem, blocks), total, trainable))
    return groups


def _group_name(stem: str, blocks: Sequence[int | None]) -> str:
    """Return `h.0-10` for many blocks, `h.11` for one, the stem for a module outside the blocks."""
    if blocks[0] is None:
        return stem
    return f"{stem}.{blocks[0]}" + (f"-{blocks[-1]}" if len(blocks) > 1 else "")


def num_elements(parameter: Tensor) -> int:
    """Return the number of weights in a parameter that may be packed into 4 bits, or divided."""
    packed = getattr(parameter, "quant_state", None)
    if (divided := getattr(parameter, "ds_numel", None)) is not None:
        return divided
    return parameter.numel() if packed is None else packed.shape.numel()


def parameter_table(groups: Sequence[ParameterGroup]) -> str:
    """Format groups, counts and shares as text, with a line for the total."""
    parameters = sum(group.parameters for group in groups)
    trainable = sum(group.trainable for group in groups)
    rows = [*groups, ParameterGroup("all", parameters, trainable)]
    width = max(len(row.name) for row in rows)
    lines = [f"{'module':<{width}}{'parameters':>18}{'trained':>18}{'share':>9}"]
    for row in rows:
        share = row.trainable / row.parameters if row.parameters else 0.0
        lines.append(f"{row.name:<{width}}{row.parameters:>18,}{row.trainable:>18,}{share:>9.2%}")
    return "\n".join(lines)


def _module(name: str) -> tuple[str, int | None]:
    """Split a parameter's name into its module, or its blocks' stem, and the block's index."""
    parts = name.removeprefix("base_model.model.").split(".")[:-1]
    for depth, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:depth]), int(part)
        if part.startswith(_PEFT_NAMES):
            return ".".join(parts[:depth]), None
    return ".".join(parts), None
