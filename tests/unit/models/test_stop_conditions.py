"""Stop strings and limits, by tokens that spell what is easy to read; stop tokens of models."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.config.data import TemplateConfig
from rlhf_ray.models.stop_conditions import StopConditions, stop_token_ids

PIECES = ("</s>", "one", " two", "\n", "\nQ", "uestion", ":", "\n\n")
STOP = 0
RULE = SamplingRule(stop_token_ids=(STOP,))


def decode(token_ids: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in token_ids)


def ended_by(tokens: Sequence[int], *strings: str, limit: int = 99, rule: SamplingRule = RULE):
    return StopConditions(99, strings).finish_reason(tokens, limit, rule, decode)


def test_limits_lie_in_the_range_and_its_end_is_never_drawn() -> None:
    stop_conditions = StopConditions(max_tokens=50, limits=(3, 6))
    limits = [stop_conditions.limit(seed) for seed in range(300)]
    assert set(limits) == {3, 4, 5}
    assert all(80 < limits.count(limit) < 120 for limit in (3, 4, 5))  # of 100, deviation 8
    assert limits == [StopConditions(50, limits=(3, 6)).limit(seed) for seed in range(300)]
    assert limits[:8] == [4, 4, 4, 3, 3, 4, 5, 3]  # a run that goes on must draw them again
    assert {StopConditions(max_tokens=50).limit(seed) for seed in range(5)} == {50}


@pytest.mark.parametrize(
    ("tokens", "strings", "reason"),
    [
        ((1, 2), (), None),
        ((1, STOP), (), "stop"),
        ((1, 2, 3), ("\n",), "stop"),
        ((1, 2, 4), ("\n",), "stop"),  # the token spells more than the string
        ((1, 2, 4), ("\nQuestion:",), None),
        ((1, 4, 5), ("\nQuestion:",), None),
        ((1, 4, 5, 6), ("\nQuestion:",), "stop"),  # over three tokens
        ((1, 3, 3), ("\n\n",), "stop"),  # over two
        ((1, 7), ("\n\n",), "stop"),
        ((1, 7), ("x", "\n"), "stop"),
        ((1, STOP), ("</s>",), "stop"),
    ],
)
def test_the_token_that_completes_a_string_is_the_last(
    tokens: tuple[int, ...], strings: tuple[str, ...], reason: str | None
) -> None:
    assert ended_by(tokens, *strings) == reason


def test_a_string_that_was_complete_before_ends_nothing_later() -> None:
    rule = SamplingRule(min_tokens=2, stop_token_ids=(STOP,))
    assert ended_by((1, 3), "\n", rule=rule) is None
    assert ended_by((1, 3, 2), "\n", rule=rule) is None
    assert ended_by((1, 3, 3), "\n\n", rule=rule) == "stop"  # begun early, completed in time
    assert ended_by((1, 3, 2, 3), "\n", rule=rule) == "stop"


def test_a_character_may_come_byte_by_byte() -> None:
    text = "why?。".encode()
    reasons = [
        StopConditions(99, strings=("。",)).finish_reason(
            text[:end], 99, RULE, lambda ids: bytes(ids).decode(errors="replace")
        )
        for end in range(1, len(text) + 1)
    ]
    assert reasons == [None] * (len(text) - 1) + ["stop"]


def test_at_its_limit_a_response_is_cut_unless_it_ends_there() -> None:
    assert ended_by((1, 2), limit=3) is None
    assert ended_by((1, 2, 1), limit=3) == "length"
    assert ended_by((1, 2, STOP), limit=3) == "stop"
    assert ended_by((1, 2, 3), "\n", limit=3) == "stop"


CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def copy(base: Path, folder: Path, eos: int | list[int], chat: bool) -> str:
    """The base with other ends in its generation config, and a chat template."""
    path = Path(shutil.copytree(base, folder / "model"))
    GenerationConfig(eos_token_id=eos).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if chat:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
        tokenizer.chat_template = CHAT
        config = AutoConfig.from_pretrained(path)
        config.vocab_size = len(tokenizer)  # the embedding has a row for the new token
        config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def test_all_that_the_generation_config_lists_but_never_the_pad(base: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    model = copy(base, tmp_path, eos=[7, pad, 9], chat=False)
    assert stop_token_ids(model) == tuple(sorted({eos, 7, 9}))
    assert stop_token_ids(str(base)) == (eos,)


def test_the_end_of_turn_of_the_chat_template(base: Path, tmp_path: Path) -> None:
    model = copy(base, tmp_path, eos=7, chat=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    eos = tokenizer.eos_token_id
    assert stop_token_ids(model) == tuple(sorted({eos, 7, end}))
    without = TemplateConfig(kind="question_answer")
    assert stop_token_ids(model, without) == tuple(sorted({eos, 7}))
