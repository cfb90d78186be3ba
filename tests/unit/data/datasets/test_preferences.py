import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.datasets.preferences import load_pairs
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.data.rendering.tokens import encode
from rlhf_ray.errors import DataError

EOS = 256


def pair(prompt: str, chosen: str | None, rejected: str | None) -> dict[str, str | None]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_each_side_is_prompt_completion_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    pairs, counts = load_pairs([pair("Q: ", "Aa", "b")], Renderer(tokenizer), 32)
    prompt, chosen, rejected = encode(tokenizer, ["Q: ", "Aa", "b"])
    assert pairs[0] == {
        "chosen_ids": [*prompt, *chosen, EOS],
        "rejected_ids": [*prompt, *rejected, EOS],
        "num_prompt_tokens": len(prompt),
    }
    assert counts == {"kept": 1}
    # Joined text would merge the space with the A: the prompt would be no prefix.
    (joined,) = encode(tokenizer, ["Q: Aa"])
    assert joined[: len(prompt)] != prompt


def test_bad_pairs_are_dropped_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [
        pair("q", "a", "b"),
        pair("q", "", "b"),
        pair("q", "a", None),
        pair("q", "same", "same"),
        pair("q", "abcdefgh", "b"),
        pair("q", "cde", "defgh"),
    ]
    pairs, counts = load_pairs(rows, Renderer(tokenizer), max_length=7, max_bad_share=0.7)
    assert counts == {"kept": 2, "empty": 2, "equal": 1, "overlong": 1}
    assert len(pairs[1]["rejected_ids"]) == 7
    with pytest.raises(DataError, match=r"prefs: 4 of 6 rows are bad"):
        load_pairs(rows, Renderer(tokenizer), max_length=7, max_bad_share=0.5, name="prefs")


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        # Seven tokens without EOS: the prompt fits, the longer completion loses its end.
        (pair("pq", "abcdefgh", "x"), "pqabcde", "pqx"),
        # Both too long: the prompt's last three, the completions' first four.
        (pair("opqrstuv", "abcdefgh", "zy"), "tuvabcd", "tuvzy"),
        # A short pair of completions leaves the prompt five.
        (pair("opqrstuv", "ab", "z"), "rstuvab", "rstuvz"),
    ],
)
def test_truncation(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, str | None], chosen: str, rejected: str
) -> None:
    pairs, _ = load_pairs([row], Renderer(tokenizer), max_length=8, overlong="truncate")
    wanted = [[*ids, EOS] for ids in encode(tokenizer, [chosen, rejected])]
    assert [pairs[0]["chosen_ids"], pairs[0]["rejected_ids"]] == wanted


def test_sides_that_truncation_makes_equal_are_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [pair("q", "abcdefgX", "abcdefgY"), pair("q", "a", "b")]
    _, counts = load_pairs(rows, Renderer(tokenizer), 6, overlong="truncate", max_bad_share=0.5)
    assert counts == {"kept": 1, "equal": 1}


def test_overlong_can_be_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"row 0 has 6 tokens, more than model\.max_length 5"):
        load_pairs([pair("q", "abcd", "b")], Renderer(tokenizer), 5, overlong="error")


def test_chats_share_their_prompt(chatml: PreTrainedTokenizerFast) -> None:
    row = {"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}
    pairs, _ = load_pairs([row], Renderer(chatml), 200)
    chosen, rejected = (chatml.decode(pairs[0][f"{side}_ids"]) for side in ("chosen", "rejected"))
    assert chosen.endswith("<|im_start|>assistant\na<|im_end|>")
    assert rejected == chosen.replace("\na<", "\nb<")
