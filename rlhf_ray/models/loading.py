"""Load and save models: plain folders, PEFT folders, hub names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.utils.integrations import gather_params_ctx
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.adapters import (
    NARROWING,
    Model,
    merge_into_base,
    peft_config,
    refuse_misfit,
)
from rlhf_ray.models.folders import (
    adapter_task,
    adapter_weights,
    base_of,
    is_adapter,
    locate,
    record_base,
    safetensors_files,
)
from rlhf_ray.models.forward import (
    HEAD_NAMES,
    initialise_head,
    keep_head_in_fp32,
)
from rlhf_ray.models.load_arguments import (
    keep_differentiable,
    load_arguments,
    own_device,
    writable,
)
from rlhf_ray.models.tokenizers import attempt, load_tokenizer, save_tokenizer

ModelT = TypeVar("ModelT", bound=nn.Module)


def load_causal_lm(path: str, settings: ModelConfig, *, quantized: bool = False) -> Model:
    """Load a causal LM in evaluation mode; a frozen PeftModel if ``path`` is a PEFT folder.

    Args:
        path: model folder, PEFT folder or hub name.
        settings: data type, attention, quantisation.
        quantized: apply ``settings.quantization`` to the (frozen) base.

    Raises:
        DataError: nothing is there, or it is not a causal LM.
        ConfigError: ``model.kwargs`` holds an argument that the model does not take.
    """
    path = locate(path)
    if is_adapter(path):
        _require_task(path, "CAUSAL_LM")
        base = load_causal_lm(base_of(path), settings, quantized=quantized)
        return with_adapter(base, path)
    model, missing = _from_pretrained(AutoModelForCausalLM, path, settings, quantized, {})
    if missing:
        raise DataError(
            f"{path} is not a whole causal LM: its files lack {len(missing)} weights, "
            f"for example {missing[0]}"
        )
    return model.eval()


def load_sequence_classifier(
    path: str,
    settings: ModelConfig,
    *,
    num_labels: int = 1,
    zero_head: bool = False,
    require_head: bool = False,
    quantized: bool = False,
    seed: int = 0,
) -> Model:
    """Load a model with a scalar head (reward model or critic) in evaluation mode.

    A causal LM gets a new head: normal with deviation 1 / sqrt(width + 1) (Stiennon et al. 2020,
    arXiv:2009.01325, appendix C), no bias. Heads are in fp32 whatever the base's data type. An
    encoder keeps its head: it can score, but it cannot be a critic.

    Args:
        path: model folder, PEFT folder or hub name.
        settings: data type, attention, quantisation.
        num_labels: outputs of the head.
        zero_head: set the head, trained or not, to zero: a critic that starts at value 0.
        require_head: refuse a model without a trained head, as a scorer must.
        quantized: apply ``settings.quantization`` to the (frozen) base.
        seed: of a new head.

    Raises:
        DataError: nothing is there, or weights other than the head's are missing, or the head has
            another number of labels, or is missing although required.
        ConfigError: ``model.kwargs`` holds an argument that the model does not take.
    """
    path = locate(path)
    if is_adapter(path):
        _require_task(path, "SEQ_CLS")
        base = load_sequence_classifier(
            base_of(path), settings, num_labels=num_labels, quantized=quantized, seed=seed
        )
        if isinstance(base, PeftModel):  # a critic that was trained on a reward model's adapter
            base, _ = merge_into_base(base)
        model = with_adapter(base, path)
        if zero_head:
            initialise_head(model, seed=None)
        return model
    labels = {"num_labels": num_labels}
    model, missing = _from_pretrained(
        AutoModelForSequenceClassification, path, settings, quantized, labels
    )
    new_head = bool(missing) and all(name.startswith(HEAD_NAMES) for name in missing)
    if (missing and not new_head) or (new_head and require_head):
        raise DataError(
            f"{path} is not a whole sequence-classification model: its files lack {missing[0]}; "
            "name a model with a trained head"
        )
    keep_head_in_fp32(model)
    if not new_head:
        _restore_head(model, path)
    if new_head or zero_head:
        initialise_head(model, seed=None if zero_head else seed)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(path, settings).pad_token_id
    return model.eval()


@torch.no_grad()
def _restore_head(model: nn.Module, path: str) -> None:
    """Read the head once more: with the base, it was rounded to the base's data type."""
    heads = {name: p for name, p in model.named_parameters() if name.startswith(HEAD_NAMES)}
    for file in safetensors_files(path):
        with safe_open(str(file), framework="pt") as tensors:
            for name in heads.keys() & set(tensors.keys()):
                with gather_params_ctx([heads[name]]):  # it may be divided (ZeRO-3)
                    heads[name].copy_(tensors.get_tensor(name))


def on_device(model: ModelT) -> ModelT:
    """Move a model to where this process computes, in place.

    What is quantised was loaded there and stays: bitsandbytes keeps its scales beside the
    weights, where a move of the weights leaves them behind, and transformers refuses to move int8.
    """
    if not any(getattr(part, "is_quantized", False) for part in model.modules()):
        nn.Module.to(model, own_device())  # PreTrainedModel.to has no usable signature
    return model


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """Write a whole model: config, safetensors, generation config, tokenizer."""
    model.config.use_cache = True  # loading switched it off; other tools expect it on
    model.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(tokenizer, folder)


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, base: str
) -> None:
    """Write a PEFT folder: adapter (and head), config, tokenizer, and the path of its base."""
    folder = Path(folder)
    local = Path(base).is_dir()
    settings: Any = model.peft_config["default"]
    settings.base_model_name_or_path = str(Path(base).resolve()) if local else base
    for key in (*NARROWING, "target_modules"):
        setattr(settings, key, peft_config(model)[key])
    model.save_pretrained(str(folder), safe_serialization=True)
    save_tokenizer(tokenizer, folder)
    if local:
        record_base(folder, base)


def _from_pretrained(
    auto_class: type[AutoModelForCausalLM | AutoModelForSequenceClassification],
    path: str,
    settings: ModelConfig,
    quantized: bool,
    more: Mapping[str, object],
) -> tuple[PreTrainedModel, list[str]]:
    """Load a model; return it and the names of the weights that its files lack."""
    arguments: dict[str, object] = {
        "dtype": getattr(torch, settings.dtype),
        "use_safetensors": True,
        "trust_remote_code": settings.trust_remote_code,
        "output_loading_info": True,
        # transformers' own error lists no sizes; mismatches are refused below.
        "ignore_mismatched_sizes": True,
        **attempt(lambda: load_arguments(path, settings, quantized=quantized), path, "config.json"),
        **more,
        **settings.kwargs,
    }
    from_pretrained: Callable[..., Any] = auto_class.from_pretrained  # annotated without the info

    def load() -> tuple[Any, dict[str, Any]]:
        try:
            return from_pretrained(path, **arguments)
        except TypeError as error:
            if not settings.kwargs:
                raise
            raise ConfigError(f"model.kwargs {settings.kwargs}: {error}") from error

    model, info = attempt(load, path, "config.json, *.safetensors")
    for name, stored, expected in info["mismatched_keys"]:
        raise DataError(
            f"{path}: weight {name} has shape {tuple(stored)}, {tuple(expected)} is needed; "
            "name a model that fits (a reward model and a critic have one label)"
        )
    keep_differentiable(model)
    if model.can_generate():
        model.generation_config = writable(model.generation_config)
    model.config.use_cache = False  # plain forwards build no cache; generate asks for its own
    return model, sorted(info["missing_keys"])


def with_adapter(base: nn.Module, folder: str) -> PeftModel:
    """Wrap a loaded base with the adapter of a PEFT folder, frozen, in evaluation mode.

    Raises:
        DataError: the adapter is unreadable or does not fit.
    """

    adapter_weights(folder)  # first: peft would open a pickle

    def load() -> PeftModel:
        model = PeftModel.from_pretrained(base, folder)  # type: ignore[arg-type]  (any module)
        refuse_misfit(model, folder)
        return model

    return attempt(load, folder, "an adapter (*.safetensors) that fits its base").eval()


def _require_task(path: str, task: str) -> None:
    actual = adapter_task(path)
    if actual != task:
        raise DataError(
            f"{path} is an adapter with task_type {actual}, but {task} is needed; merge it into "
            "its base first (command merge), or name another folder"
        )
