import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.prompts import load_prompts
from rlhf_ray.errors import DataError
from rlhf_ray.types import Prompt


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_other_columns_travel_along(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question_id": 7, "prompt": "why", "label": 3}, {"prompt": "how", "label": None}]
    prompts, counts = load_prompts(rows, tokenizer, 8)
    assert prompts == [
        Prompt("7", "why", ids(tokenizer, "why"), {"question_id": 7, "label": 3}),
        Prompt("1", "how", ids(tokenizer, "how"), {"label": None}),
    ]
    assert counts == {"kept": 2}


def test_one_prompt_for_rows_of_one_question(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question_id": i // 3, "prompt": f"q{i // 3}", "n": i} for i in range(3000)]
    prompts, counts = load_prompts(rows, tokenizer, 8)
    assert [prompt.fields["n"] for prompt in prompts] == list(range(0, 3000, 3))
    assert counts == {"kept": 1000, "repeated": 2000}


def test_bad_rows_are_dropped_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": text} for text in ("abc", "", "abcd", None, "abcdef", "a", "b", "c", "d")]
    prompts, counts = load_prompts(rows, tokenizer, 4, max_bad_share=0.4)
    assert [prompt.text for prompt in prompts] == ["abc", "abcd", "a", "b", "c", "d"]
    assert [prompt.id for prompt in prompts] == ["0", "2", "5", "6", "7", "8"]
    assert counts == {"kept": 6, "empty": 2, "overlong": 1}
    with pytest.raises(DataError, match=r"my set: 3 of 9 rows .*empty: 2, overlong: 1"):
        load_prompts(rows, tokenizer, 4, max_bad_share=0.2, name="my set")


def test_truncation_keeps_the_end_and_the_text_agrees(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, counts = load_prompts([{"prompt": "abcdef"}], tokenizer, 4, overlong="truncate")
    assert prompts == [Prompt("0", "cdef", ids(tokenizer, "cdef"))]
    assert counts == {"kept": 1}


def test_overlong_can_be_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a"}, {"prompt": "abcdef"}]
    with pytest.raises(DataError, match=r"row 1 has 6 tokens.*rollout\.max_prompt_tokens 4"):
        load_prompts(rows, tokenizer, 4, overlong="error")
