import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.texts import load_token_lists
from rlhf_ray.data.tokens import encode
from rlhf_ray.errors import DataError


def test_prompt_and_completion_are_tokenised_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "Q: ", "completion": "Aa", "text": "unused"}]
    token_lists, counts = load_token_lists(rows, tokenizer)
    prompt, completion = encode(tokenizer, ["Q: ", "Aa"])
    assert token_lists == [prompt + completion]
    assert counts == {"kept": 1}


def test_plain_text(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "abc"}, {"text": " "}, {"text": "d"}]
    token_lists, counts = load_token_lists(rows, tokenizer, max_bad_share=0.5)
    assert token_lists == encode(tokenizer, ["abc", "d"])
    assert counts == {"kept": 2, "empty": 1}
    with pytest.raises(DataError, match="1 of 3 rows are bad"):
        load_token_lists(rows, tokenizer, max_bad_share=0.2)


def test_only_preferred_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": str(i), "preferred": i % 5 == 0} for i in range(10)]
    token_lists, counts = load_token_lists(rows, tokenizer, preferred_only=True)
    assert token_lists == encode(tokenizer, ["0", "5"])
    assert counts == {"kept": 2, "not_preferred": 8}
    assert len(load_token_lists(rows, tokenizer)[0]) == 10


def test_rows_that_do_not_say_are_all_used(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(load_token_lists([{"text": "a"}], tokenizer, preferred_only=True)[0]) == 1


def test_missing_columns_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"sft: no column text.*found prompt, answer"):
        load_token_lists([{"prompt": "a", "answer": "b"}], tokenizer, name="sft")
