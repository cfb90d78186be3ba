"""Which tokens end a response."""

from typing import Any

from transformers import GenerationConfig

from rlhf_ray.errors import DataError
from rlhf_ray.models.loading import load_tokenizer


def stop_token_ids(model: str) -> tuple[int, ...]:
    """Every eos id of the tokenizer and of the generation config; never the pad id.

    Raises:
        DataError: nothing would ever end a response.
    """
    tokenizer: Any = load_tokenizer(model)
    try:
        listed: Any = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        listed = None
    ids = {tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
    ids -= {None, tokenizer.pad_token_id}
    if not ids:
        raise DataError(f"{model} names no end-of-sequence token; set eos_token in its tokenizer")
    return tuple(sorted(ids))
