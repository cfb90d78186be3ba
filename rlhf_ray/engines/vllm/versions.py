"""What differs between vLLM 0.19 (the CUDA 12 lock), 0.26 and 0.32, and between its model runners.

All else that this room uses has the same name and signature in the three; ``VLLM_SOURCES`` makes
tests/unit/engines/vllm read other versions' sources. vLLM has two classes of model runner: V1 on
CPUs and in 0.19, V2 on GPUs since 0.26, but for models and features that V2 lacks.
"""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any, TypedDict

import torch
import vllm

_V2 = "vllm.v1.worker.gpu.model_runner"
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


class EngineFacts(TypedDict):
    """What one worker computes with."""

    runner: str
    """V1 or V2."""
    attention: list[str]
    """Names of the attention backends."""
    device: str
    """Name of the device."""


def engine_facts(runner: Any) -> EngineFacts:
    """Return what a model runner computes with, read from its own objects."""
    layers = runner.vllm_config.compilation_config.static_forward_context.values()
    attentions = [layer for layer in layers if hasattr(layer, "get_attn_backend")]
    backends = {attention.get_attn_backend().get_name() for attention in attentions}
    device = runner.device
    return {
        "runner": "V2" if any(base.__module__ == _V2 for base in type(runner).__mro__) else "V1",
        "attention": sorted(backends),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def prefer_exact_runner(temperature: float, dtype: str) -> None:
    """Have vLLM's future processes use the runner whose log-probs are computed in fp32.

    Before 0.32 V2 scales logits by the temperature in the model's data type: in bfloat16, a logit
    of 16 is off by .03 afterwards, and so are tokens and log-probs.
    """
    release = tuple(map(int, vllm.__version__.split(".")[:2]))
    if release < (0, 32) and temperature != 1 and dtype != "float32":
        os.environ.setdefault(RUNNER_VARIABLE, "0")


def rename_mapper(model: Any) -> Any:
    """Return what maps a checkpoint's names to the model's, without merging parts; None if none."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    for name in ("get_rename_mapper", "get_unstacked_mapper"):  # of 0.32 and 0.26
        if hasattr(mapper, name):
            return getattr(mapper, name)()
    return mapper  # in 0.19 it merges nothing


def reload_weights(runner: Any, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Load weights of the checkpoint's names and layout into the running model, in place."""
    reload = getattr(runner, "reload_weights", None)
    if reload is None:  # V2 of 0.19; that of 0.26 borrows V1's too
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        reload = partial(GPUModelRunner.reload_weights, runner)
    reload(weights_iterator=weights, is_checkpoint_format=True)
