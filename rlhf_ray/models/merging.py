"""Folding an adapter into its base."""

import shutil
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import folders, loading


def merge_adapter(
    base_path: str, adapter_path: str, out_path: str | Path, settings: ModelConfig
) -> float:
    """Write base + adapter as one model folder, with tokenizer and generation config.

    Each weight is computed in fp32 as ``W + scale * B @ A`` and rounded once to
    ``settings.dtype``. A reward model (SEQ_CLS) keeps its trained head.

    Args:
        base_path: folder or hub name of the base, read without quantisation.
        adapter_path: PEFT folder.
        out_path: folder to write; replaced whole when it exists.
        settings: data type of the result.

    Returns:
        The share of the changed weights (delta not 0) whose stored value differs from the
        base's: 1 when nothing was lost to rounding, and 1 when the adapter changes nothing.

    Raises:
        DataError: base or adapter cannot be loaded, or do not fit each other.
    """
    model = _wrapped(base_path, adapter_path, settings)
    survived = _add_deltas(model)
    merged = model.unload()
    out = Path(out_path)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    loading.save_model(merged, loading.load_tokenizer(adapter_path), temporary)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return survived


def _wrapped(base_path: str, adapter_path: str, settings: ModelConfig) -> Any:
    if not folders.is_adapter(adapter_path):
        raise DataError(
            f"{adapter_path} is not a PEFT folder: it has no {folders.ADAPTER_CONFIG}; "
            "there is nothing to merge"
        )
    if folders.adapter_task(adapter_path) == "SEQ_CLS":
        base = loading.load_sequence_classifier(base_path, settings)
    else:
        base = loading.load_causal_lm(base_path, settings)
    return loading.with_adapter(base, adapter_path)


@torch.no_grad()
def _add_deltas(model: Any) -> float:
    num_changed = num_survived = 0
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        weight: Tensor = module.get_base_layer().weight  # type: ignore[assignment,operator]
        before = weight.detach().clone()
        delta: Tensor = module.get_delta_weight("default").float()  # type: ignore[operator]
        weight.copy_(before.float() + delta)
        num_changed += int((delta != 0).sum())
        num_survived += int(((weight != before) & (delta != 0)).sum())
    return num_survived / num_changed if num_changed else 1.0
