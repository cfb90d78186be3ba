from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.datasets.texts import LossOn, load_documents
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import Overlong, encode
from rlhf_ray.errors import DataError

EOS = 256
Tokenizer = PreTrainedTokenizerFast


def test_prompt_and_completion_are_tokenised_apart(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "Q: ", "completion": "Aa", "text": "unused"}]
    documents, counts = load_documents(rows, Renderer(tokenizer))
    prompt, completion = encode(tokenizer, ["Q: ", "Aa"])
    assert documents["token_ids"][:] == [[*prompt, *completion, EOS]]
    assert documents["learnt"][:] == [[1] * 6]
    assert counts == {"kept": 1}


def test_plain_text(tokenizer: Tokenizer) -> None:
    rows = [{"text": "abc"}, {"text": " "}, {"text": "d"}]
    documents, counts = load_documents(rows, Renderer(tokenizer), max_bad_share=0.5)
    assert documents["token_ids"][:] == [[*ids, EOS] for ids in encode(tokenizer, ["abc", "d"])]
    assert counts == {"kept": 2, "empty": 1}
    with pytest.raises(DataError, match="1 of 3 rows are bad"):
        load_documents(rows, Renderer(tokenizer), max_bad_share=0.2)


def test_only_preferred_answers(tokenizer: Tokenizer) -> None:
    rows = [{"text": str(i), "preferred": i % 5 == 0} for i in range(10)]
    documents, counts = load_documents(rows, Renderer(tokenizer), preferred_only=True)
    assert documents["token_ids"][:] == [[*ids, EOS] for ids in encode(tokenizer, ["0", "5"])]
    assert counts == {"kept": 2, "not_preferred": 8}
    assert len(load_documents(rows, Renderer(tokenizer))[0]) == 10


def test_rows_that_do_not_say_are_all_used(tokenizer: Tokenizer) -> None:
    assert len(load_documents([{"text": "a"}], Renderer(tokenizer), preferred_only=True)[0]) == 1


def test_missing_columns_are_named(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "a", "answer": "b"}]
    with pytest.raises(DataError, match=r"sft: no column text.*found prompt, answer"):
        load_documents(rows, Renderer(tokenizer), name="sft")


@pytest.mark.parametrize(
    ("loss_on", "learnt"),
    [
        ("all", None),
        ("completion", "two<|im_end|>"),
        ("assistant", "one<|im_end|>two<|im_end|>"),
    ],
)
def test_what_is_learnt_of_a_chat(chatml: Tokenizer, loss_on: LossOn, learnt: str | None) -> None:
    turns = [("user", "a"), ("assistant", "one"), ("user", "b")]
    messages = [{"role": role, "content": text} for role, text in turns]
    row: dict[str, Any] = {"messages": messages, "completion": "two"}
    documents, _ = load_documents([row], Renderer(chatml), loss_on=loss_on)
    (document,) = documents.to_list()
    pairs = zip(document["token_ids"], document["learnt"], strict=True)
    wanted = chatml.decode(document["token_ids"]) if learnt is None else learnt
    assert chatml.decode([token for token, is_learnt in pairs if is_learnt]) == wanted


def test_plain_text_holds_no_answer(tokenizer: Tokenizer) -> None:
    with pytest.raises(
        DataError, match=r"plain text, so sft\.loss_on completion .* sft\.loss_on to all"
    ):
        load_documents([{"text": "a"}], Renderer(tokenizer), loss_on="completion")


def test_texts_that_are_too_long(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "abc", "completion": "de"}, {"prompt": "abcde", "completion": "f"}]

    def load(loss_on: LossOn, overlong: Overlong) -> tuple[Any, dict[str, int]]:
        return load_documents(
            rows, Renderer(tokenizer), 1.0, loss_on=loss_on, max_tokens=5, overlong=overlong
        )

    with pytest.raises(DataError, match=r"row 0 has 6 tokens, more than sft\.block_size 5"):
        load("all", "error")
    with pytest.raises(DataError, match=r"none of 2 rows can be used \(dropped: overlong: 2\)"):
        load("all", "drop")
    documents, _ = load("all", "truncate")
    assert [tokenizer.decode(ids) for ids in documents["token_ids"][:]] == ["abcde", "abcde"]
    # Of the second nothing but its prompt would be left.
    documents, counts = load("completion", "truncate")
    assert documents["learnt"][:] == [[0, 0, 0, 1, 1]]
    assert counts == {"kept": 1, "overlong": 1}
