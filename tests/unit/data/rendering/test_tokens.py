import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.rendering.tokens import encode, eos_id
from rlhf_ray.errors import DataError


def test_no_special_tokens_and_no_padding(llama3: PreTrainedTokenizerFast) -> None:
    short, long = encode(llama3, ["a", "abc"])
    assert (len(short), len(long)) == (1, 3)
    assert long[0] == short[0]
    assert encode(llama3, []) == []


def test_the_end_of_text_token_is_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    assert eos_id(tokenizer) == 256
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-sequence"):
        eos_id(without)
