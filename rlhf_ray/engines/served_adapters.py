"""Adapters as they pass between learners and engines: as bytes, by their digest, within limits.

Without peft, whose import takes seconds: engines' processes do not need it.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping

import torch
from safetensors import torch as safetensors
from torch import Tensor

from rlhf_ray.errors import ConfigError

TensorDict = dict[str, Tensor]
tensors_from_bytes, tensors_to_bytes = safetensors.load, safetensors.save
"""Tensors as the bytes of a safetensors file, and back."""

_SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM takes as ``max_lora_rank``; adapters of any lower rank fit."""


def digest(state: Mapping[str, Tensor]) -> str:
    """Return 16 hex digits of SHA-256 over names, shapes, types and bytes, in order of names."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def servable_rank(rank: int) -> int:
    """Return the least ``max_lora_rank`` of vLLM that holds adapters of ``rank``.

    Raises:
        ConfigError: ``rank`` is above vLLM's limit.
    """
    for served in _SERVED_RANKS:
        if served >= rank:
            return served
    raise ConfigError(f"vLLM serves adapters of rank {_SERVED_RANKS[-1]} at most, got {rank}")


def refuse_unservable(targets: Iterable[str], servable: Collection[str]) -> None:
    """Refuse an adapter on modules that the generators' engine cannot serve.

    Args:
        targets: names of the adapted modules, as in a PEFT config, whole or last parts.
        servable: names, last parts only, of the modules that the engine can apply an adapter to.

    Raises:
        ConfigError: an adapted module is not servable.
    """
    if unservable := sorted({name.rpartition(".")[2] for name in targets} - set(servable)):
        raise ConfigError(
            f"lora.target_modules: the generators' engine cannot serve an adapter on "
            f"{', '.join(unservable)} in this architecture; it can on "
            f"{', '.join(sorted(servable))}. Set lora.target_modules to a list of these"
        )
