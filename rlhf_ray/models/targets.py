"""Which modules of a model an adapter is on: choose them, name them so that peft finds them again.

peft takes much more than its own loader, a merge or vLLM can follow. What one of these cannot do
is refused before the first step.
"""

from collections import Counter

from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config.model import LoraConfig
from rlhf_ray.errors import ConfigError

_WRAPPER = "base_model.model."
"""How the names of modules begin inside a PeftModel."""

_NESTED = {"base_layer"}
"""What peft calls the first of two adapters on tensors of one module."""


def leaf(name: str) -> str:
    """Return the last part of a module's name."""
    return name.rpartition(".")[2]


def requested_targets(model: nn.Module, lora: LoraConfig) -> str | list[str]:
    """Return ``lora.target_modules`` as peft is to get them.

    Raises:
        ConfigError: one names no module of the model, or one that is not linear.
    """
    modules = dict(model.named_modules())
    linear = {name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    if isinstance(lora.target_modules, str):
        if lora.peft.get("layers_to_transform") is None:
            return lora.target_modules
        # peft refuses to choose layers of what all-linear stands for.
        output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        return sorted({leaf(name) for name in linear if modules[name] is not output})
    has = f"it has {', '.join(linear_layers(model))}"
    matches = {
        target: {name for name in modules if f".{name}".endswith(f".{target}")}
        for target in lora.target_modules
    }
    if missing := [target for target, names in matches.items() if not names]:
        raise ConfigError(f"lora.target_modules: the model has no {', '.join(missing)}; {has}")
    if other := [target for target, names in matches.items() if names - linear]:
        raise ConfigError(
            f"lora.target_modules: {', '.join(other)} is no linear layer of the model; {has}"
        )
    return lora.target_modules


def refuse_untrainable(model: PeftModel, lora: LoraConfig) -> None:
    """Refuse a fresh adapter that could be trained, but not merged or served.

    Raises:
        ConfigError: it is on a weight that two modules share, on tensors of experts, or not on a
            layer that ``layers_to_transform`` names.
    """
    if shared := shared_targets(model):
        raise ConfigError(
            f"lora.target_modules: the weight of {', '.join(shared)} is that of the input "
            "embedding too (tie_word_embeddings), so a merge would change both; leave "
            f"{', '.join(shared)} out"
        )
    adapted = adapted_modules(model)
    tensors = {leaf(name) for name in adapted if isinstance(_module(model, name), ParamWrapper)}
    if tensors:
        usable = sorted({leaf(name) for name in adapted} - tensors)
        raise ConfigError(
            f"lora.target_modules {lora.target_modules}: {', '.join(sorted(tensors - _NESTED))} of "
            "this mixture-of-experts model are no linear layers but tensors, an adapter on which "
            f"can be neither merged nor served; set lora.target_modules=[{','.join(usable)}]"
        )
    layers = lora.peft.get("layers_to_transform")
    wanted = [] if layers is None else [layers] if isinstance(layers, int) else layers
    absent = [index for index in wanted if not any(f".{index}." in name for name in adapted)]
    if absent:
        raise ConfigError(
            f"lora.peft.layers_to_transform {layers}: the model has no layer "
            f"{', '.join(map(str, absent))} with lora.target_modules {lora.target_modules}"
        )


def linear_layers(model: nn.Module) -> list[str]:
    """Return the names, last parts only, of a model's linear layers."""
    kinds = nn.Linear | Conv1D
    return sorted({leaf(n) for n, module in model.named_modules() if isinstance(module, kinds)})


def adapted_modules(model: PeftModel) -> list[str]:
    """Return the whole names, in the base, of the modules that the adapter is on."""
    return [
        name.removeprefix(_WRAPPER)
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.r
    ]


def shared_targets(model: PeftModel) -> list[str]:
    """Return the adapted modules whose weight is another module's, too."""
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    return [
        leaf(name)
        for name in adapted_modules(model)
        if owners[id(getattr(_module(model, name).get_base_layer(), "weight", None))] > 1
    ]


def recorded_targets(model: PeftModel) -> list[str]:
    """Return ``target_modules`` by which peft puts the adapter on the same modules again.

    Last parts of names where these suffice, because that is what other tools read; whole names
    where the model has another module called so.
    """
    adapted = adapted_modules(model)
    leaves, whole = {leaf(name) for name in adapted}, set(adapted)
    saved_whole = set(model.peft_config["default"].modules_to_save or ())  # type: ignore[attr-defined]
    for prefixed, _ in model.named_modules():
        name = prefixed.removeprefix(_WRAPPER)
        parts = name.split(".")
        if leaf(name) not in leaves or name in whole or saved_whole & set(parts):
            continue
        if not any(".".join(parts[:depth]) in whole for depth in range(1, len(parts))):
            return sorted(adapted)
    return sorted(leaves)


def _module(model: PeftModel, name: str) -> LoraLayer:
    return model.get_submodule(_WRAPPER + name)  # type: ignore[return-value]
