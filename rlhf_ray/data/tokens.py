"""From text to token ids, in one way for all stages.

A prompt and its completion are tokenised apart and then joined: in PPO the model continues the
prompt's ids, so those ids must also begin every sequence that it was trained on. Tokenising the
joined text could merge the prompt's last character with the completion's first.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Overlong = Literal["drop", "truncate", "error"]
"""What to do with a text over its limit: leave its row out, cut it, or stop."""

Row = Mapping[str, Any]


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens, of any length."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def eos_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Id of the token that ends a text.

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


def is_text(value: object) -> bool:
    """Whether a cell holds text with something in it."""
    return isinstance(value, str) and bool(value.strip())


def batches(rows: Iterable[Row], size: int = 1000) -> Iterator[list[Row]]:
    """Rows in lists of at most ``size``: tokenizers are faster on many texts at once."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def overlong_error(name: str, row: int, num_tokens: int, limit: int, key: str) -> DataError:
    """The error for ``data.overlong: error``."""
    return DataError(
        f"{name}: row {row} has {num_tokens} tokens, more than {key} {limit}; raise {key}, or set "
        "data.overlong to drop or truncate"
    )
