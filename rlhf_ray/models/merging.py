"""Merge an adapter on disk into its base on disk."""

import shutil
from pathlib import Path

from peft import PeftModel

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import folders, loading
from rlhf_ray.models.adapters import merge_into_base
from rlhf_ray.models.probes import probe_logits
from rlhf_ray.models.verification import verify_saved


def merge_adapter(
    base_path: str, adapter_path: str, out_path: str | Path, settings: ModelConfig
) -> float:
    """Write base + adapter as one model folder, with tokenizer and generation config.

    Weights are merged as in `merge_into_base` and stored in ``settings.dtype``. A reward model
    (SEQ_CLS) keeps its trained head.

    Args:
        base_path: folder or hub name of the base, read without quantisation.
        adapter_path: PEFT folder.
        out_path: folder to write; an existing one is replaced only once the new one is complete.
        settings: data type of the result.

    Returns:
        The share of the change that survived rounding, as from `merge_into_base`.
    """
    merged, survived = merge_into_base(_wrapped(base_path, adapter_path, settings))
    out = Path(out_path)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    loading.save_model(merged, loading.load_tokenizer(adapter_path, settings), temporary)
    verify_saved(merged, probe_logits(merged), str(temporary), settings)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    return survived


def _wrapped(base_path: str, adapter_path: str, settings: ModelConfig) -> PeftModel:
    if not folders.is_adapter(adapter_path):
        raise DataError(
            f"{adapter_path} is not an adapter: it has no {folders.ADAPTER_CONFIG}; "
            "there is nothing to merge"
        )
    if folders.adapter_task(adapter_path) == "SEQ_CLS":
        base = loading.load_sequence_classifier(base_path, settings)
    else:
        base = loading.load_causal_lm(base_path, settings)
    return loading.with_adapter(base, adapter_path)
