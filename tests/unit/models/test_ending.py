"""Limits and stop strings, by tokens that spell what is easy to read."""

from collections.abc import Sequence

import pytest

from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.models.ending import Ending

PIECES = ("</s>", "one", " two", "\n", "\nQ", "uestion", ":", "\n\n")
STOP = 0
RULE = SamplingRule(stop_token_ids=(STOP,))


def decode(token_ids: Sequence[int]) -> str:
    return "".join(PIECES[token] for token in token_ids)


def ended_by(tokens: Sequence[int], *strings: str, limit: int = 99, rule: SamplingRule = RULE):
    return Ending(99, strings).finish_reason(tokens, limit, rule, decode)


def test_limits_lie_in_the_range_and_its_end_is_never_drawn() -> None:
    ending = Ending(max_tokens=50, limits=(3, 6))
    limits = [ending.limit(seed) for seed in range(300)]
    assert set(limits) == {3, 4, 5}
    assert all(80 < limits.count(limit) < 120 for limit in (3, 4, 5))  # of 100, deviation 8
    assert limits == [Ending(50, limits=(3, 6)).limit(seed) for seed in range(300)]
    assert limits[:8] == [4, 4, 4, 3, 3, 4, 5, 3]  # a run that goes on must draw them again
    assert {Ending(max_tokens=50).limit(seed) for seed in range(5)} == {50}


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
        Ending(99, strings=("。",)).finish_reason(
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
