"""Merge an adapter on disk into its base on disk; load what was saved again, and compare."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import folders, loading
from rlhf_ray.models.adapters import Model, attach, merge_into_base, peft_config, unwrapped
from rlhf_ray.models.probes import probe_logits, refuse_change

MEMORY_SHARE = 0.8
"""Largest share of the free memory that loading a model once more may take."""


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


def verify_saved(model: Model, logits: Tensor, folder: str, settings: ModelConfig) -> None:
    """Load a saved model and compare its logits with those that it had.

    Names and shapes alone where the model does not fit a second time, or its base is quantised.

    Args:
        model: the trained model.
        logits: its `probe_logits`.
        folder: where it, or its adapter, was saved.
        settings: how it is loaded.

    Raises:
        DataError: the folder cannot be loaded, or holds another model.
    """
    is_lm = unwrapped(model).get_output_embeddings() is not None  # type: ignore[operator]
    dtype = getattr(torch, settings.dtype)
    needed = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    if needed > MEMORY_SHARE * free_memory(_own_group()) or (
        settings.quantization != "none" and folders.is_adapter(folder)
    ):
        verify_names(folder, settings, is_lm=is_lm)
        return
    saved = probe_logits(_load(folder, settings, is_lm))
    refuse_change(logits, saved, dtype, f"{folder} is not the model that was saved")


def free_memory(group: Path) -> int:
    """Return the bytes that a process may still take.

    In a container or a Slurm job that is less than the machine has left.

    Args:
        group: folder of the process's control group; limits of those above it count too.
    """
    free = psutil.virtual_memory().available
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # it has no limit
            limit, used = (int((folder / f"memory.{n}").read_text()) for n in ("max", "current"))
            free = min(free, limit - used)
    return free


def _own_group() -> Path:
    with suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        names = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
        return Path("/sys/fs/cgroup", *names)
    return Path("/sys/fs/cgroup")


def verify_names(folder: str, settings: ModelConfig, *, is_lm: bool) -> None:
    """Check that the files of a model have the names and shapes that loading it needs.

    Takes no memory: the weights are on the meta device.

    Raises:
        DataError: they have not.
    """
    _load(folder, _on_meta(settings), is_lm)


def zero_adapter(
    base: str, settings: ModelConfig, lora: LoraConfig
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the PEFT config and tensors of an adapter that leaves a causal LM as it is.

    Takes no memory but the adapter's: of the base its shapes are enough.

    Raises:
        ConfigError: the base has no such modules as ``lora`` names.
    """
    model = attach(
        loading.load_causal_lm(base, _on_meta(settings)), lora, "CAUSAL_LM", seed=0, dropout=0.0
    )
    shapes = get_peft_model_state_dict(model, save_embedding_layers=False)
    return peft_config(model), {name: torch.zeros(each.shape) for name, each in shapes.items()}


def _on_meta(settings: ModelConfig) -> ModelConfig:
    return settings.model_copy(update={"kwargs": settings.kwargs | {"device_map": "meta"}})


def _load(folder: str, settings: ModelConfig, is_lm: bool) -> Model:
    if is_lm:
        return loading.load_causal_lm(folder, settings)
    return loading.load_sequence_classifier(
        folder, settings, require_head=not folders.is_adapter(folder)
    )
