"""Folding an adapter into its base."""

import shutil
from pathlib import Path
from typing import Any

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import folders, loading
from rlhf_ray.models.folding import fold


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
    merged, survived = fold(_wrapped(base_path, adapter_path, settings))
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
