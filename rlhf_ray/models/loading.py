"""Load and save models: plain folders, PEFT folders, hub names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
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
    base_of,
    first_line,
    is_adapter,
    locate,
    record_base,
)
from rlhf_ray.models.forward import HEAD_NAMES, has_token_head, initialise_head, keep_head_in_fp32
from rlhf_ray.models.quantization import keep_differentiable, quantization_config

STRICT = ModelConfig()
"""How models load unless a config says otherwise: none of their own code runs."""

T = TypeVar("T")

ModelT = TypeVar("ModelT", bound=nn.Module)

_SPARE_PADS = (
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<|fim_pad|>",
    "<|padding|>",  # Pythia, GPT-NeoX
    "<｜▁pad▁｜>",  # DeepSeek
    "<|endoftext|>",
    "<unk>",
)
"""Tokens that can serve as a missing pad: special ones that answers do not contain."""


def load_tokenizer(path: str, settings: ModelConfig = STRICT) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, PEFT folder or hub name.

    It pads on the right, and its pad is not eos: with pad = eos, masking the padding would also
    mask the end of each answer, and no model would learn to stop.

    A PEFT folder without a tokenizer of its own uses its base's.

    Args:
        path: model folder, PEFT folder or hub name.
        settings: whether a tokenizer's own code may run; default: it may not.

    Raises:
        DataError: nothing can be loaded from ``path``, or the tokenizer has no eos, or no pad
            other than eos.
    """
    path = locate(path)
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = locate(base_of(path))
    trusted = settings.trust_remote_code  # unset, transformers would ask on the terminal
    tokenizer = _attempt(
        lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=trusted),
        path,
        "tokenizer files",
    )
    tokenizer.padding_side = "right"
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer of {path} has no eos token, so no model can learn where to stop; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = _spare_pad(tokenizer, path)
    return tokenizer


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
    arXiv:2009.01325, appendix C), no bias. A linear head over tokens stays in fp32 whatever the
    base's data type. An encoder keeps its head: it can score, but it cannot be a critic.

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
    if has_token_head(model):
        keep_head_in_fp32(model)
    if new_head or zero_head:
        initialise_head(model, seed=None if zero_head else seed)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = load_tokenizer(path, settings).pad_token_id
    return model.eval()


def on_gpu(model: ModelT) -> ModelT:
    """Move a model to this process's GPU, in place, if there is one."""
    if torch.cuda.is_available():
        nn.Module.cuda(model)  # PreTrainedModel.cuda has no usable signature
    return model


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path
) -> None:
    """Write a whole model: config, safetensors, generation config, tokenizer."""
    model.config.use_cache = True  # loading switched it off; other tools expect it on
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(str(folder))


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
    tokenizer.save_pretrained(str(folder))
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
    load: Callable[..., Any] = auto_class.from_pretrained  # annotated without the loading info
    try:
        model, info = _attempt(lambda: load(path, **arguments), path, "config.json, *.safetensors")
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


def rope_parameters(path: str, settings: ModelConfig) -> dict[str, Any] | None:
    """Return a model's rotary parameters with ``model.rope_scaling`` applied; None: unchanged.

    A finished classifier keeps the parameters that it was trained with: scaling is for the base.

    Raises:
        ConfigError: the architecture has no rotary embedding, or one for each kind of layer.
    """
    if settings.rope_scaling is None:
        return None
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    if any("SequenceClassification" in name for name in config.architectures or ()):
        return None
    own = getattr(config, "rope_parameters", None)
    if not own or any(isinstance(value, dict) for value in own.values()):
        what = "one for each kind of layer" if own else "no rotary embedding"
        raise ConfigError(
            f"model.rope_scaling: {path} ({config.model_type}) has {what}; leave it out, or change "
            "the model folder's config.json"
        )
    return {**own, **settings.rope_scaling}


def with_adapter(base: nn.Module, folder: str) -> PeftModel:
    """Wrap a loaded base with the adapter of a PEFT folder, frozen, in evaluation mode.

    Raises:
        DataError: the adapter is unreadable or does not fit.
    """

    def load() -> PeftModel:
        model = PeftModel.from_pretrained(base, folder)  # type: ignore[arg-type]  (any module)
        refuse_misfit(model, folder)
        return model

    return _attempt(load, folder, "an adapter (*.safetensors) that fits its base").eval()


def _attempt(load: Callable[[], T], path: str, needed: str) -> T:
    """Run a library's loader; turn its errors into one DataError."""
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            raise DataError(
                f"{path} needs code that comes with it, and model.trust_remote_code is false. Read "
                "that code; if you trust it, set model.trust_remote_code=true"
            ) from error
        raise DataError(
            f"{path} cannot be loaded ({first_line(error)}); it must hold {needed}"
        ) from error


def _require_task(path: str, task: str) -> None:
    actual = adapter_task(path)
    if actual != task:
        raise DataError(
            f"{path} is an adapter with task_type {actual}, but {task} is needed; merge it into "
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
