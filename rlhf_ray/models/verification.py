"""Load what was saved of a model, as the next stage will, and compare it with the original."""

import psutil
import torch
from torch import Tensor

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.models.adapters import Model, unwrapped
from rlhf_ray.models.folders import is_adapter
from rlhf_ray.models.loading import load_causal_lm, load_sequence_classifier
from rlhf_ray.models.probes import probe_logits, refuse_change

MEMORY_SHARE = 0.8
"""Largest share of the free memory that loading a model once more may take."""


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
    if needed > MEMORY_SHARE * psutil.virtual_memory().available or (
        settings.quantization != "none" and is_adapter(folder)
    ):
        verify_names(folder, settings, is_lm=is_lm)
        return
    saved = probe_logits(_load(folder, settings, is_lm))
    refuse_change(logits, saved, dtype, f"{folder} is not the model that was saved")


def verify_names(folder: str, settings: ModelConfig, *, is_lm: bool) -> None:
    """Check that the files of a model have the names and shapes that loading it needs.

    Takes no memory: the weights are on the meta device.

    Raises:
        DataError: they have not.
    """
    kwargs = settings.kwargs | {"device_map": "meta"}
    _load(folder, settings.model_copy(update={"kwargs": kwargs}), is_lm)


def _load(folder: str, settings: ModelConfig, is_lm: bool) -> Model:
    if is_lm:
        return load_causal_lm(folder, settings)
    return load_sequence_classifier(folder, settings, require_head=not is_adapter(folder))
