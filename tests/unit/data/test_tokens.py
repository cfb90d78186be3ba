import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.tokens import encode, eos_id, is_text
from rlhf_ray.errors import DataError


def test_no_special_tokens_and_no_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    short, long = encode(tokenizer, ["a", "abc"])
    assert (len(short), len(long)) == (1, 3)
    assert long[0] == short[0]
    assert encode(tokenizer, []) == []


def test_the_end_of_text_token_is_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    assert eos_id(tokenizer) == 256
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-sequence"):
        eos_id(without)


@pytest.mark.parametrize(
    ("value", "expected"), [("a", True), (" \n", False), (None, False), (3, False)]
)
def test_is_text(value: object, expected: bool) -> None:
    assert is_text(value) is expected
