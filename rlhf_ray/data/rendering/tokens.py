"""Tokenization of texts, special token ids, and the error for texts over their limit."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Tokenizer

from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["drop", "truncate", "error"]
"""What to do with a text over its limit: drop its row, cut it, or stop."""


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, without special tokens, however long."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def tokenizer_state(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return all that decides how a tokenizer turns rows into ids: equal texts, equal ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if isinstance(backend, Tokenizer) else str(tokenizer.get_vocab())
    return json.dumps([rules, tokenizer.chat_template, str(tokenizer.special_tokens_map)])


def without_prefix(tokenizer: "PreTrainedTokenizerBase") -> Tokenizer | None:
    """Return the tokenizer without the space that it puts before a text; None if it puts none.

    Behind a prompt that space would be one too many. Llama 1 adds it as a normalizer, later ones of
    SentencePiece as a Metaspace, and some of GPT-2's kind as an option.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return None
    state = json.loads(backend.to_str())
    plain = state | {name: _without_prefix(state[name]) for name in ("normalizer", "pre_tokenizer")}
    if plain == state:
        return None
    built = Tokenizer.from_str(json.dumps(plain))
    built.no_truncation()
    built.no_padding()
    return built


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a step of a tokenizer's file without its prefix; None where nothing is left."""
    if step is None or step["type"] == "Prepend":
        return None
    plain = dict(step)
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            plain[name] = [left for part in step[name] if (left := _without_prefix(part))]
    if step["type"] == "Metaspace":
        plain["prepend_scheme"] = "never"
    if "add_prefix_space" in step:
        plain["add_prefix_space"] = False
    return plain


def decode_after(
    tokenizer: "PreTrainedTokenizerBase",
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    skip_special_tokens: bool = False,
) -> str:
    """Return the text by which tokens continue a prompt.

    A tokenizer of SentencePiece drops the space before the first word of what it decodes, so the
    prompt is decoded along and cut off. A prompt that ends within a character is left out.
    """

    def spelt(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    before, whole = spelt(prompt_ids), spelt([*prompt_ids, *token_ids])
    return whole[len(before) :] if whole.startswith(before) else spelt(token_ids)


def eos_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the token that ends a text.

    Raises:
        DataError: the tokenizer has none.
    """
    token_id = tokenizer.eos_token_id
    if not isinstance(token_id, int):
        raise DataError(
            f"The tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no end-of-"
            "sequence token, so a model cannot learn to stop; set eos_token in its "
            "tokenizer_config.json"
        )
    return token_id


def pad_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the padding token's id of a tokenizer from `load_tokenizer`, which requires one."""
    return int(tokenizer.pad_token_id)  # type: ignore[arg-type]


def overlong_error(name: str, row: int, num_tokens: int, limit: int, key: str) -> DataError:
    """Return the error for ``data.overlong: error``."""
    return DataError(
        f"{name}: row {row} has {num_tokens} tokens, more than {key} {limit}; raise {key}, or set "
        "data.overlong to drop or truncate"
    )
