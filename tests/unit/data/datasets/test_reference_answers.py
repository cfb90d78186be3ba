"""The answers of a held-out row that count, and their tokens."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.data.datasets.prompts import load_prompts
from rlhf_ray.data.datasets.reference_answers import reference_answers, reference_rollouts
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.types import Prompt


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({}, []),
        ({"reference": "r", "chosen": "c"}, ["r"]),
        ({"reference": ["r", "", "s"]}, ["r", "s"]),
        ({"reference": "  ", "completion": "a"}, ["a"]),
        ({"completion": "a", "label": True}, ["a"]),
        ({"completion": "bad", "label": False}, []),
        ({"chosen": "c", "rejected": "x"}, ["c"]),
        ({"reference": 7}, []),
    ],
)
def test_the_good_answers_of_a_row(fields: dict[str, Any], found: list[str]) -> None:
    assert reference_answers(Prompt("0", "p", (1,), fields)) == found


def test_tokens_are_those_that_a_stage_trains_on(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "Q: "}, {"prompt": "Q: ", "id": "b", "chosen": "An ox"}]
    renderer = Renderer(tokenizer)
    prompts, _ = load_prompts(rows, renderer, 8)
    (answer,) = reference_rollouts(prompts, renderer, 100)
    assert answer.prompt == prompts[1]
    trained = renderer.full("Q: ", "An ox").token_ids
    assert [*answer.prompt.token_ids, *answer.response_ids] == trained
    assert trained[-1] == tokenizer.eos_token_id
    (cut,) = reference_rollouts(prompts, renderer, len(prompts[1].token_ids) + 2)
    assert tokenizer.decode(cut.response_ids) == "An"


def test_a_chat_is_laid_out_by_its_template(chatml: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(chatml, TemplateConfig(kind="chat"))
    prompts, _ = load_prompts([{"prompt": "Why?", "completion": "So."}], renderer, 100)
    (answer,) = reference_rollouts(prompts, renderer, 200)
    assert chatml.decode(answer.response_ids) == "So.<|im_end|>"
