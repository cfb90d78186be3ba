"""Tokenization of texts, special token ids, and the error for texts over their limit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

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
