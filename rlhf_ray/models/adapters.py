"""LoRA adapters: attaching, reading, writing, identifying."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft import set_peft_model_state_dict as _set_state
from safetensors import safe_open
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes

from rlhf_ray.config.model import LoraConfig
from rlhf_ray.errors import ConfigError

TensorDict = dict[str, torch.Tensor]

_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def attach(
    model: Any,
    lora: LoraConfig,
    task: Literal["CAUSAL_LM", "SEQ_CLS"],
    *,
    seed: int,
    dropout: float,
) -> PeftModel:
    """Wrap a model with a fresh LoRA adapter; only the adapter (and a SEQ_CLS head) is trainable.

    Args:
        seed: of the adapter's initial ``A`` matrices.
        dropout: given apart from ``lora`` because PPO switches it off.

    Raises:
        ConfigError: ``lora.target_modules`` names a module that the model does not have.
    """
    settings = PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  (peft computes with floats as well)
        lora_dropout=dropout,
        target_modules=lora.target_modules,
        task_type=task,
        **lora.peft,
    )
    _refuse_missing_targets(model, lora)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, settings)


def _refuse_missing_targets(model: Any, lora: LoraConfig) -> None:
    if isinstance(lora.target_modules, str):
        return
    leaves = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = [target for target in lora.target_modules if target.rpartition(".")[2] not in leaves]
    if missing:
        linear = sorted(
            {
                n.rpartition(".")[2]
                for n, m in model.named_modules()
                if isinstance(m, torch.nn.Linear)
            }
        )
        raise ConfigError(
            f"lora.target_modules: the model has no {', '.join(missing)}; "
            f"it has {', '.join(linear)}"
        )


def adapter_state(model: PeftModel) -> TensorDict:
    """A copy of the adapter (and saved head) under PEFT's own names, on CPU, contiguous."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def load_adapter_state(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put an adapter into a wrapped model, in place.

    Raises:
        ConfigError: the adapter has other names than the model's.
    """
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if expected != set(state):
        odd = sorted(expected ^ set(state))
        raise ConfigError(
            f"The adapter does not fit the model: {len(odd)} names differ, for example {odd[0]}"
        )
    _set_state(model, dict(state))


class AdapterSlot:
    """A loaded base that has one adapter at a time, for inference.

    Args:
        base: the model; it is changed in place.
    """

    def __init__(self, base: Any) -> None:
        self.model = base
        """The base, in a PEFT wrapper once it has an adapter."""
        self._peft_config: Mapping[str, Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no adapter was put in yet."""
        return self._peft_config is None

    def put(self, settings: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
        """Replace the adapter.

        Args:
            settings: its PEFT config as plain values.
            state: its tensors under PEFT's names.

        Raises:
            ConfigError: tensors and config do not belong together.
        """
        if self._peft_config != settings:
            base = self.model if self.is_empty else self.model.unload()
            self.model = get_peft_model(base, PeftLoraConfig(**settings)).eval()
            self._peft_config = settings
        load_adapter_state(self.model, state)


def servable_rank(rank: int) -> int:
    """The least rank that vLLM can be set up for and that holds adapters of ``rank``.

    Raises:
        ConfigError: there is none.
    """
    for served in _SERVED_RANKS:
        if served >= rank:
            return served
    raise ConfigError(f"vLLM serves adapters of rank {_SERVED_RANKS[-1]} at most, got {rank}")


def refuse_unservable(targets: Iterable[str], servable: Collection[str]) -> None:
    """Refuse an adapter on modules that the generators' engine has no place for.

    Args:
        targets: names of the adapted modules, as in `peft_config`.
        servable: names of the modules that the engine can apply an adapter to.

    Raises:
        ConfigError: naming those that it cannot, and those that it can.
    """
    odd = sorted(set(targets) - set(servable))
    if odd:
        raise ConfigError(
            f"lora.target_modules: the generators' engine cannot serve an adapter on "
            f"{', '.join(odd)} in this architecture; it can on {', '.join(sorted(servable))}. Set "
            "lora.target_modules to a list of these"
        )


def refuse_misfit(model: PeftModel, folder: str | Path) -> None:
    """Refuse the adapter of a PEFT folder that its base takes in part only, as peft does.

    Args:
        model: the base, wrapped with what the folder holds.
        folder: the PEFT folder.

    Raises:
        ValueError: the folder has no safetensors file, or holds other adapter weights than the
            model with it has.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError("it has no adapter_model.safetensors; save the adapter with safetensors")
    with safe_open(str(file), framework="pt") as tensors:
        stored = {name for name in tensors.keys() if "lora_" in name}  # noqa: SIM118  (not a dict)
    expected = {
        name
        for name in get_peft_model_state_dict(model, save_embedding_layers=False)
        if "lora_" in name
    }
    odd = sorted(stored ^ expected)
    if odd:
        raise ValueError(
            f"{len(odd)} of its weights and those that its base takes do not match, for example "
            f"{odd[0]}"
        )


def peft_config(model: PeftModel) -> dict[str, Any]:
    """The adapter's PEFT config with plain values, its target modules as the resolved list."""
    settings = model.peft_config["default"].to_dict()
    settings["target_modules"] = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if hasattr(module, "lora_A") and "default" in module.lora_A  # type: ignore[operator]
        }
    )
    return json.loads(json.dumps(settings, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", str(value))


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """First 16 hex digits of SHA-256 over names, shapes, types and bytes, in order of names."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


__all__ = [
    "AdapterSlot",
    "TensorDict",
    "adapter_state",
    "attach",
    "digest",
    "load_adapter_state",
    "peft_config",
    "refuse_misfit",
    "refuse_unservable",
    "servable_rank",
    "tensors_from_bytes",
    "tensors_to_bytes",
]
