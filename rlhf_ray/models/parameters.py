"""How many parameters each part of a model has, and how many of them are trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

_INSIDE = ("base_layer", "modules_to_save", "original_module", "lora_")
"""How the parts of a module begin that PEFT has wrapped."""


@dataclass(frozen=True)
class ParameterGroup:
    """One module outside the blocks, or the blocks in a row that are alike."""

    name: str
    """Such as `transformer.wte`, `transformer.h.11`, `transformer.h.0-10`."""
    parameters: int
    """All of them, frozen ones included."""
    trainable: int
    """Those that are trained."""


def parameter_groups(model: Any) -> list[ParameterGroup]:
    """Groups in the order of the model; weights that are shared are counted once.

    Args:
        model: plain or wrapped by peft; what 4 bits hold is counted as what it stands for.
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
        groups.append(ParameterGroup(_joined(stem, blocks), total, trainable))
    return groups


def _joined(stem: str, blocks: Sequence[int | None]) -> str:
    """`h.0-10` of many blocks, `h.11` of one, the name alone of a module outside the blocks."""
    if blocks[0] is None:
        return stem
    return f"{stem}.{blocks[0]}" + (f"-{blocks[-1]}" if len(blocks) > 1 else "")


def num_elements(parameter: Tensor) -> int:
    """Elements of a parameter; of one packed into 4 bits, those that it stands for."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else packed.shape.numel()


def parameter_table(groups: Sequence[ParameterGroup]) -> str:
    """Groups, counts and shares as text, with a line for all of them."""
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
    """A parameter's module outside the blocks, or the stem and the index of its block."""
    parts = name.removeprefix("base_model.model.").split(".")[:-1]
    for place, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[:place]), int(part)
        if part.startswith(_INSIDE):
            return ".".join(parts[:place]), None
    return ".".join(parts), None
