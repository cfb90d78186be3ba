"""Load and save tokenizers: of plain folders, PEFT folders, hub names."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import DataError, RlhfError
from rlhf_ray.models.folders import base_of, first_line, is_adapter, locate

STRICT = ModelConfig()
"""How models load unless a config says otherwise: none of their own code runs."""

T = TypeVar("T")

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
    tokenizer = attempt(
        lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=trusted),
        path,
        "tokenizer files",
    )
    _refuse_unknown_ids(tokenizer, path, trusted)
    tokenizer.padding_side = "right"
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer of {path} has no eos token, so no model can learn where to stop; "
            "set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = _spare_pad(tokenizer, path)
    return tokenizer


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Return the text of a token as it stands within a text, with the space before it.

    Alone, some tokenizers decode it without that space; as the second of two they keep it. A part
    of a character of several bytes is the replacement character.
    """
    alone, twice = tokenizer.decode([token]), tokenizer.decode([token, token])
    return str(twice)[len(alone) :]


def _refuse_unknown_ids(tokenizer: PreTrainedTokenizerBase, path: str, trusted: bool) -> None:
    """Refuse a tokenizer some of whose ids the model's embedding has no row for.

    The model would fail at the first text with such a token: on a GPU with a device assert.
    """
    base = base_of(path) if is_adapter(path) else path
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        return
    config = attempt(
        lambda: AutoConfig.from_pretrained(base, trust_remote_code=trusted), base, "config.json"
    )
    size = getattr(config.get_text_config(), "vocab_size", None)
    # Gemma 3's small models have no row for pictures, which no text of ours holds.
    picture = tokenizer.special_tokens_map.get("image_token")
    ids = {token: number for token, number in tokenizer.get_vocab().items() if token != picture}
    token, largest = max(ids.items(), key=lambda item: item[1])
    if size is not None and largest >= size:
        raise DataError(
            f"The tokenizer of {path} has token {token!r} with id {largest}, but the model's "
            f"embedding has {size} rows (vocab_size of its config.json): remove the tokens from "
            f"{size} on, or resize the embedding (resize_token_embeddings) and save the model"
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer that pads on the side that it came with; ours pads on the right."""
    padding_side = tokenizer.padding_side
    tokenizer.padding_side = tokenizer.init_kwargs.get("padding_side", type(tokenizer).padding_side)
    tokenizer.save_pretrained(str(folder))
    tokenizer.padding_side = padding_side


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


def attempt(load: Callable[[], T], path: str, needed: str) -> T:
    """Run a library's loader; turn its errors into one DataError.

    All kinds of them: the libraries index, compare and call what a folder's JSON files hold.
    """
    try:
        return load()
    except RlhfError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise DataError(
                f"{path} needs code that comes with it, and model.trust_remote_code is false. Read "
                "that code; if you trust it, set model.trust_remote_code=true"
            ) from error
        raise DataError(
            f"{path} cannot be loaded ({first_line(error)}); it must hold {needed}"
        ) from error
