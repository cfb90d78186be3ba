import math
from functools import partial
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import DataSource, TemplateConfig
from rlhf_ray.config.rewards import RougeSourceConfig
from rlhf_ray.data.datasets.prompts import load_prompts
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError
from rlhf_ray.rewards.required_columns import require_read_columns
from rlhf_ray.types import Prompt


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_other_columns_travel_along(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question_id": 7, "prompt": "why", "label": 3}, {"prompt": "how", "label": None}]
    prompts, counts = load_prompts(rows, Renderer(tokenizer), 8)
    assert list(prompts) == [
        Prompt("7", "why", ids(tokenizer, "why"), {"question_id": 7, "label": 3}),
        Prompt("1", "how", ids(tokenizer, "how"), {"label": None}),
    ]
    assert counts == {"kept": 2}


def test_one_prompt_for_rows_of_one_question(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"question_id": i // 3, "prompt": f"q{i // 3}", "n": i} for i in range(3000)]
    prompts, counts = load_prompts(rows, Renderer(tokenizer), 8)
    assert [prompt.fields["n"] for prompt in prompts] == list(range(0, 3000, 3))
    assert counts == {"kept": 1000, "repeated": 2000}


def test_ids_are_those_of_a_source(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    sources = []
    for name in "ab":
        path = tmp_path / f"{name}.jsonl"
        rows = (f'{{"id": {n // 2}, "prompt": "{name}{n // 2}"}}\n' for n in range(4))
        path.write_text("".join(rows))
        sources.append(DataSource(path=str(path)))
    prompts, counts = load_prompts(load_rows(sources, "prompts"), Renderer(tokenizer), 8)
    assert [prompt.text for prompt in prompts] == ["a0", "b0", "a1", "b1"]
    assert [prompt.id for prompt in prompts] == ["0:0", "1:0", "0:1", "1:1"]
    assert [prompt.fields for prompt in prompts] == [{"id": 0}, {"id": 0}, {"id": 1}, {"id": 1}]
    assert counts == {"kept": 4, "repeated": 4}


def test_a_place_is_no_id(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"id": 1, "prompt": "a"}, {"prompt": "b"}]
    prompts, counts = load_prompts(rows, Renderer(tokenizer), 8)
    assert [prompt.text for prompt in prompts] == ["a", "b"]
    assert counts == {"kept": 2}


def test_bad_rows_are_dropped_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": text} for text in ("abc", "", "abcd", None, "abcdef", "a", "b", "c", "d")]
    prompts, counts = load_prompts(rows, Renderer(tokenizer), 4, max_bad_share=0.4)
    assert [prompt.text for prompt in prompts] == ["abc", "abcd", "a", "b", "c", "d"]
    assert [prompt.id for prompt in prompts] == ["0", "2", "5", "6", "7", "8"]
    assert counts == {"kept": 6, "empty": 2, "overlong": 1}
    with pytest.raises(DataError, match=r"my set: 2 of 9 rows .*\(empty: 2\)"):
        load_prompts(rows, Renderer(tokenizer), 4, max_bad_share=0.2, name="my set")


def test_a_row_without_what_a_reward_reads_is_a_bad_row(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    values = ("x", ["y", None], 0, None, [], [None], math.nan, [math.nan])
    rows = [{"prompt": str(n), "answer": value} for n, value in enumerate(values)]
    source = RougeSourceConfig(type="rouge", column="answer")
    checks = [partial(require_read_columns, [source])]
    prompts, counts = load_prompts(
        [*rows, {"prompt": "a"}],
        Renderer(tokenizer),
        4,
        max_bad_share=0.8,
        checks=checks,
    )
    assert [prompt.text for prompt in prompts] == ["0", "1", "2"]
    assert counts == {"kept": 3, "no_answer": 6}
    with pytest.raises(
        DataError, match=r"5 of 8 rows .*rouge reads the column 'answer', which rows lack"
    ):
        load_prompts(rows, Renderer(tokenizer), 4, checks=checks)
    assert load_prompts(rows, Renderer(tokenizer), 4)[1] == {"kept": 8}


def test_long_prompts_are_left_out_and_not_bad(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "abcdef"}] * 9 + [{"prompt": "abc"}]
    assert load_prompts(rows, Renderer(tokenizer), 4, max_bad_share=0.0)[1] == {
        "kept": 1,
        "overlong": 9,
    }
    with pytest.raises(DataError, match=r"none of 9 rows .*overlong: 9.*raise the length limit"):
        load_prompts(rows[:9], Renderer(tokenizer), 4)


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        (["gsm8k"] * 4, ["gsm8k", "gsm8k#1", "gsm8k#3"]),
        ([""] * 4, ["0", "1", "2", "3"]),
        ([" "] * 4, ["0", "1", "2", "3"]),
        ([math.nan] * 4, ["0", "1", "2", "3"]),
        ([None] * 4, ["0", "1", "2", "3"]),
        ([1, 2, 3, 4], ["1", "2", "3", "4"]),
        ([0, 0, 0, 0], ["0", "0#1", "0#3"]),
        ([1, 1, 2, 2], ["1", "1#1", "2", "2#3"]),
    ],
)
def test_an_id_that_different_prompts_share_identifies_none(
    tokenizer: PreTrainedTokenizerFast, ids: list[object], kept: list[str]
) -> None:
    texts = ["a", "b", "a", "c"]
    rows = [{"id": i, "prompt": text} for i, text in zip(ids, texts, strict=True)]
    prompts, counts = load_prompts(rows, Renderer(tokenizer), 8)
    assert [prompt.id for prompt in prompts] == kept
    odd = sum("#" in prompt.id for prompt in prompts)
    odd += 4 * (ids[0] in ("", " ") or ids[0] != ids[0])
    assert counts.get("kept_without_identity", 0) == odd
    assert counts["kept"] == len(kept)


def test_truncation_keeps_the_end_and_the_text_agrees(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, counts = load_prompts(
        [{"prompt": "abcdef"}], Renderer(tokenizer), 4, overlong="truncate"
    )
    assert list(prompts) == [Prompt("0", "cdef", ids(tokenizer, "cdef"))]
    assert counts == {"kept": 1}


def test_the_text_is_without_the_start_token_that_the_ids_keep(
    llama3: PreTrainedTokenizerFast,
) -> None:
    begin = llama3.bos_token_id
    (prompt,), _ = load_prompts([{"prompt": "why"}], Renderer(llama3), 8)
    assert (prompt.text, prompt.token_ids) == ("why", (begin, *ids(llama3, "why")))
    rows = [{"prompt": "abcd<|begin|>ef"}, {"prompt": "ab<|eot_id|>c<|begin|>e"}]
    cut, _ = load_prompts(rows, Renderer(llama3), 3, overlong="truncate")
    assert [prompt.text for prompt in cut] == ["ef", "c<|begin|>e"]
    assert cut[0].token_ids == (begin, *ids(llama3, "ef"))


def test_overlong_can_be_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a"}, {"prompt": "abcdef"}]
    with pytest.raises(DataError, match=r"row 1 has 6 tokens.*rollout\.max_prompt_tokens 4"):
        load_prompts(rows, Renderer(tokenizer), 4, overlong="error")


def test_chats_are_rendered_and_their_messages_kept(chatml: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "why"}]
    rows = [{"messages": turns, "prompt": None, "label": 3}]
    (prompt,), _ = load_prompts(rows, Renderer(chatml), 100)
    assert prompt.text.endswith("<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n")
    assert chatml.decode(prompt.token_ids) == prompt.text
    assert prompt.fields == {"label": 3, "messages": turns}
    # A plain prompt that became a turn says which: a reward model renders it by its own template.
    chat = Renderer(chatml, TemplateConfig(kind="chat"))
    rendered = {"prompt": "Question: why\n\nAnswer: ", "question": "why"}
    (plain,), _ = load_prompts([rendered], chat, 100)
    assert plain.token_ids == prompt.token_ids
    assert plain.fields == {"question": "why", "messages": turns}


def test_rows_that_the_template_refuses_are_counted(chatml: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(chatml)
    refusal = "{% if messages[0]['content'] == 'why' %}{{ raise_exception('no turns') }}{% endif %}"
    chatml.chat_template = refusal + str(chatml.chat_template)
    rows = [{"messages": [{"role": "user", "content": "why"}]}]
    with pytest.raises(DataError, match=r"template_refuses: the chat template refuses it: no"):
        load_prompts(rows, renderer, 100)


def test_held_out_prompts_and_samples_are_drawn(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"q{number // 2}"} for number in range(200)]
    prompts, _ = load_prompts(rows, Renderer(tokenizer), 8)
    train, held_out = prompts.split(20, seed=0)
    texts = [prompt.text for prompt in held_out]
    assert (len(train), len(texts)) == (180, 20)
    assert {prompt.text for prompt in train}.isdisjoint(texts)
    assert 25 < sum(int(text[1:]) for text in texts) / 20 < 75
    few = [prompt.id for prompt in prompts.sample(5, seed=0)]
    more = [prompt.id for prompt in prompts.sample(10, seed=0)]
    assert set(few) < set(more)
    assert (len(few), few != ["0", "1", "2", "3", "4"]) == (5, True)
    assert [prompt.id for prompt in prompts.sample(500, seed=0)] == [p.id for p in prompts]


def test_a_part_of_the_prompts_is_a_view_of_them(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"q{number}", "tags": [number]} for number in range(10)]
    prompts, _ = load_prompts(rows, Renderer(tokenizer), 8)
    assert [prompt.text for prompt in prompts[2:-2][1:]] == ["q3", "q4", "q5", "q6", "q7"]
    assert (len(prompts[2:-2]), prompts[-1].fields, prompts[3:][0].id) == (6, {"tags": [9]}, "3")
