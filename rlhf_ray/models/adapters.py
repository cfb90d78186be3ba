"""LoRA adapters: attach, read, write, identify, merge into the base in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft import set_peft_model_state_dict as _set_state
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from rlhf_ray.config.model import LoraConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.folders import adapter_weights, first_line
from rlhf_ray.models.probes import probe_logits, refuse_change
from rlhf_ray.models.targets import (
    linear_layers,
    recorded_targets,
    refuse_untrainable,
    requested_targets,
    shared_targets,
)

Model = PreTrainedModel | PeftModel
"""A transformers model, with or without an adapter around it."""

NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Keys of peft.LoraConfig that take modules out of ``target_modules``."""


def attach(
    model: Model,
    lora: LoraConfig,
    task: Literal["CAUSAL_LM", "SEQ_CLS"],
    *,
    seed: int,
    dropout: float,
) -> PeftModel:
    """Wrap a model with a fresh LoRA adapter; only the adapter (and a SEQ_CLS head) is trainable.

    Args:
        model: the base; it is changed in place.
        lora: shape of the adapter.
        task: what the model is.
        seed: of the adapter's initial ``A`` matrices.
        dropout: apart from ``lora``, because PPO switches it off.

    Raises:
        ConfigError: ``lora.target_modules`` names a module that the model does not have, or one
            that cannot be adapted, saved, merged or served.
    """
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  (peft computes with floats as well)
        lora_dropout=dropout,
        target_modules=requested_targets(model, lora),
        task_type=task,
        **lora.peft,
    )
    linear = linear_layers(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            wrapped = _wrapped(model, settings)
        except ValueError as error:  # what peft says of an architecture that it does not adapt so
            raise ConfigError(
                f"lora.target_modules {lora.target_modules}: peft cannot put this adapter on "
                f"{type(model).__name__} ({first_line(error)}); set a list of its linear layers: "
                f"{', '.join(linear)}"
            ) from error
    refuse_untrainable(wrapped, lora)
    return wrapped


def _wrapped(base: nn.Module, settings: PeftLoraConfig) -> PeftModel:
    model = get_peft_model(base, settings)  # type: ignore[arg-type]  (takes any module)
    assert isinstance(model, PeftModel)  # mixed adapter types are asked for by an argument
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def compute_in_base_dtype(model: nn.Module) -> None:
    """Let fp32 adapters compute in their base's data type, as an engine does with rounded ones.

    peft computes in the adapter's data type: a pass would keep an fp32 copy of each layer's input.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or layer.lora_variant:
            continue
        parts = [*layer.lora_A.values(), *layer.lora_B.values()]
        if all(type(part) is nn.Linear and part.bias is None for part in parts):
            layer.cast_input_dtype_enabled = False
            for part in parts:
                part.__class__ = _ComputesInInputDtype


class _ComputesInInputDtype(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.to(input.dtype))


def adapter_state(model: PeftModel) -> dict[str, Tensor]:
    """Copy the adapter (and saved head) under PEFT's own names, on CPU, contiguous."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def load_adapter_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Replace the adapter's tensors in a wrapped model, in place.

    Raises:
        ConfigError: the tensors' names are not those of the model's adapter.
    """
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # peft itself ignores unknown and missing names.
    if mismatched := sorted(expected ^ set(state)):
        raise ConfigError(
            f"The adapter does not fit the model: {len(mismatched)} names differ, for example "
            f"{mismatched[0]}"
        )
    _set_state(model, dict(state))


class AdapterSlot:
    """A loaded base that holds one adapter at a time, for inference."""

    def __init__(self, base: Model) -> None:
        self.model = base
        """The base, in a PEFT wrapper once it has an adapter."""
        self._peft_config: Mapping[str, Any] | None = None

    @property
    def is_empty(self) -> bool:
        """True until the first adapter is put in."""
        return self._peft_config is None

    def put(self, settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Replace the adapter.

        Raises:
            ConfigError: tensors and config do not fit each other.
        """
        if self._peft_config != settings or not isinstance(self.model, PeftModel):
            base = self.model
            if not self.is_empty and isinstance(base, PeftModel):
                base = base.unload()  # PEFT would stack a second adapter on the first
            self.model = _wrapped(base, PeftLoraConfig(**settings)).eval()
            self._peft_config = settings
        load_adapter_state(self.model, state)


@torch.no_grad()
def merge_into_base(model: PeftModel) -> tuple[PreTrainedModel, float]:
    """Merge the adapter into its base in memory; a trained head (SEQ_CLS) replaces the base's.

    Each weight is computed in fp32 as ``W + scale * B @ A`` and rounded once to its data type;
    peft's own merge adds in the base's data type and rounds twice.

    Returns:
        The transformers model, and the share of the changed weights (delta not 0) whose stored
        value differs from the base's: 1 if rounding lost nothing, or if the adapter is zero.

    Raises:
        DataError: the base is quantised, or the adapter is of a kind that such a merge changes: on
            a weight that two modules share, or more than a product added to a layer's weight.
    """
    before = probe_logits(model)
    if shared := shared_targets(model):
        raise DataError(
            f"The adapter is on {', '.join(shared)}, whose weight is that of the input embedding "
            "too (tie_word_embeddings): merged, it would change both. Use it unmerged, or train "
            f"one that leaves {', '.join(shared)} out"
        )
    num_changed = num_survived = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        layer: Any = module.get_base_layer()
        weight = getattr(layer, "weight", None)
        if weight is None:
            raise DataError(
                f"The adapter is on tensors of {type(layer).__name__}, no linear layer: it can be "
                "used, but not merged"
            )
        if not weight.is_floating_point():
            raise DataError(
                "An adapter cannot be merged into a quantised base in memory: merge it into its "
                "base on disk (command merge) and name the result, or set model.quantization=none"
            )
        changed, survived = _add(weight, module.get_delta_weight("default"))  # type: ignore[operator]
        num_changed += changed
        num_survived += survived
    merged = model.unload()
    refuse_change(before, probe_logits(merged), merged.dtype, "The merge went wrong")
    return merged, num_survived / num_changed if num_changed else 1.0


def _add(weight: Tensor, delta: Tensor) -> tuple[int, int]:
    """Add in fp32, in place; return how many numbers the delta changes, and how many changed."""
    before, delta = weight.detach().clone(), delta.float()
    weight.copy_(before.float() + delta)
    return int((delta != 0).sum()), int(((weight != before) & (delta != 0)).sum())


def refuse_misfit(model: PeftModel, folder: str | Path) -> None:
    """Refuse a PEFT folder whose adapter fits its base only in part; peft loads it without a word.

    Args:
        model: the base, wrapped with the folder's adapter.
        folder: the PEFT folder.

    Raises:
        DataError: the folder has no safetensors file.
        ValueError: its adapter weights are not those of the wrapped model.
    """
    with safe_open(str(adapter_weights(folder)), framework="pt") as tensors:
        stored = {name for name in tensors.keys() if "lora_" in name}  # noqa: SIM118  (not a dict)
    expected = {
        name
        for name in get_peft_model_state_dict(model, save_embedding_layers=False)
        if "lora_" in name
    }
    if mismatched := sorted(stored ^ expected):
        raise ValueError(
            f"{len(mismatched)} of its weights do not match those that its base takes, for example "
            f"{mismatched[0]}"
        )


def peft_config(model: PeftModel) -> dict[str, Any]:
    """Return the adapter's PEFT config as plain values, target modules as the resolved list.

    vLLM needs the names: ``all-linear`` and regular expressions mean nothing to it. The list says
    all: what narrowed it down is left out.
    """
    settings = model.peft_config["default"].to_dict()
    settings |= dict.fromkeys(NARROWING) | {"target_modules": recorded_targets(model)}
    return json.loads(json.dumps(settings, default=_plain))


def _plain(value: object) -> object:
    """Convert sets and enums, which JSON does not have."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", str(value))
