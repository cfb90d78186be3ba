"""Loading and saving of models: plain folders, PEFT folders, hub names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.adapters import peft_config, refuse_misfit
from rlhf_ray.models.folders import (
    adapter_task,
    base_of,
    first_line,
    is_adapter,
    locate,
    record_base,
)
from rlhf_ray.models.folding import fold
from rlhf_ray.models.heads import (
    HEAD_NAMES,
    has_token_head,
    initialise_head,
    keep_head_in_fp32,
)
from rlhf_ray.models.quantization import keep_differentiable, quantization_config
from rlhf_ray.models.rope import rope_parameters

T = TypeVar("T")

_SPARE_PADS = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<|fim_pad|>",
    "<|endoftext|>",
    "<unk>",
)
"""Tokens that may stand in for a missing pad: special ones that answers do not contain."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Tokenizer of a model folder, PEFT folder or hub name; pads on the right, pad is not eos.

    A PEFT folder without a tokenizer of its own uses its base's.

    Raises:
        DataError: nothing can be loaded from ``path``, or the tokenizer has no eos, or no pad
            other than eos.
    """
    path = locate(path)
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = locate(base_of(path))
    tokenizer = _attempt(lambda: AutoTokenizer.from_pretrained(path), path, "tokenizer files")
    tokenizer.padding_side = "right"
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer of {path} has no eos token, so no model can learn where to stop; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = _spare_pad(tokenizer, path)
    return tokenizer


def load_causal_lm(path: str, settings: ModelConfig, *, quantized: bool = False) -> Any:
    """A causal LM in evaluation mode; a frozen PeftModel where ``path`` is a PEFT folder.

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
) -> Any:
    """A model with a scalar head: a reward model or a critic, in evaluation mode.

    A causal LM gets a new head: normal with deviation 1 / sqrt(width + 1) (Stiennon et al. 2020,
    arXiv:2009.01325, appendix C), no bias. A linear head over tokens stays in fp32 whatever the
    base's data type. An encoder's head is taken as it is: it scores, but can be no critic.

    Args:
        path: model folder, PEFT folder or hub name.
        settings: data type, attention, quantisation.
        num_labels: outputs of the head.
        zero_head: set the head to zero, a trained one as well: a critic that starts at value 0.
        require_head: refuse a model without a trained head, as a scorer must.
        quantized: apply ``settings.quantization`` to the (frozen) base.
        seed: of a new head.

    Raises:
        DataError: nothing is there, or it lacks weights other than the head's, or its head has
            another number of labels, or no head where one is required.
        ConfigError: ``model.kwargs`` holds an argument that the model does not take.
    """
    path = locate(path)
    if is_adapter(path):
        _require_task(path, "SEQ_CLS")
        base = load_sequence_classifier(
            base_of(path), settings, num_labels=num_labels, quantized=quantized, seed=seed
        )
        if isinstance(base, PeftModel):  # a critic that was trained on a reward model's adapter
            base, _ = fold(base)
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
    if has_token_head(model):
        keep_head_in_fp32(model)
    if new_head or zero_head:
        initialise_head(model, seed=None if zero_head else seed)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(path).pad_token_id
    return model.eval()


def save_model(model: Any, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a whole model: config, safetensors, generation config, tokenizer."""
    model.config.use_cache = True
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(str(folder))


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, base: str
) -> None:
    """Write a PEFT folder: adapter (and head), config, tokenizer, and where its base is.

    Args:
        base: folder or hub name of the model that the adapter was trained on.
    """
    folder = Path(folder)
    local = Path(base).is_dir()
    settings: Any = model.peft_config["default"]
    settings.base_model_name_or_path = str(Path(base).resolve()) if local else base
    settings.target_modules = peft_config(model)["target_modules"]
    model.save_pretrained(str(folder), safe_serialization=True)
    tokenizer.save_pretrained(str(folder))
    if local:
        record_base(folder, base)


def _from_pretrained(
    auto_class: Any, path: str, settings: ModelConfig, quantized: bool, more: dict[str, Any]
) -> tuple[Any, list[str]]:
    """The model and the names of the weights that its files lack."""
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, settings.dtype),
        "use_safetensors": True,
        "trust_remote_code": settings.trust_remote_code,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # refused below, with the sizes
        **more,
        **settings.kwargs,
    }
    if settings.attn_implementation != "auto":
        arguments["attn_implementation"] = settings.attn_implementation
    if quantized and settings.quantization != "none":
        arguments["quantization_config"] = quantization_config(settings)
    rope = _attempt(lambda: rope_parameters(path, settings), path, "config.json")
    if rope is not None:
        arguments["rope_parameters"] = rope
    try:
        model, info = _attempt(
            lambda: auto_class.from_pretrained(path, **arguments),
            path,
            "config.json, *.safetensors",
        )
    except TypeError as error:
        if not settings.kwargs:
            raise
        raise ConfigError(f"model.kwargs {settings.kwargs}: {error}") from error
    for name, stored, expected in info["mismatched_keys"]:
        raise DataError(
            f"{path}: weight {name} has shape {tuple(stored)}, {tuple(expected)} is needed; "
            "name a model that fits (a reward model and a critic have one label)"
        )
    keep_differentiable(model)
    model.config.use_cache = False  # plain forwards build no cache; generate asks for its own
    return model, sorted(info["missing_keys"])


def with_adapter(base: Any, folder: str) -> PeftModel:
    """Wrap a loaded base with the adapter of a PEFT folder, frozen, in evaluation mode.

    Raises:
        DataError: the adapter is unreadable or does not fit.
    """

    def load() -> PeftModel:
        model = PeftModel.from_pretrained(base, folder)
        refuse_misfit(model, folder)
        return model

    return _attempt(load, folder, "an adapter (*.safetensors) that fits its base").eval()


def _attempt(load: Callable[[], T], path: str, needed: str) -> T:
    """Run a library's loader; what it raises becomes one message."""
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{path} cannot be loaded ({first_line(error)}); it must hold {needed}"
        ) from error


def _require_task(path: str, task: str) -> None:
    found = adapter_task(path)
    if found != task:
        raise DataError(
            f"{path} is an adapter with task_type {found}, where {task} is needed; merge it into "
            "its base first (command merge), or name another folder"
        )


def _spare_pad(tokenizer: PreTrainedTokenizerBase, path: str) -> str:
    vocabulary = tokenizer.get_vocab()
    for token in _SPARE_PADS:
        if token in vocabulary and token != tokenizer.eos_token:
            return token
    raise DataError(
        f"The tokenizer of {path} has no pad token other than eos {tokenizer.eos_token!r}: the end "
        "of an answer and padding would look the same. Set pad_token to an unused token of its "
        "vocabulary in tokenizer_config.json"
    )
