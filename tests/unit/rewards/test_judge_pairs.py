"""A judge of pairs against a real HTTP server on this machine."""

import asyncio
import re
from typing import Any

import pytest
from json_server import chat_completion, serve

from rlhf_ray.config.rewards import PairJudgeConfig
from rlhf_ray.errors import RlhfError
from rlhf_ray.rewards.judge import Pair, PairJudge, Verdict
from rlhf_ray.types import Prompt

PAIRS = [
    Pair(Prompt("", "Why?", ()), a, b) for a, b in [("long one", "x"), ("y", "longer"), ("no", "")]
]


def prefers_longer(number: int, body: Any) -> tuple[int, Any]:
    """Prefers the longer answer; has no opinion where one is "no"."""
    question = body["messages"][0]["content"]
    a, b = re.findall(r"<response [AB]>\n(.*)\n</response", question)
    if "no" in (a, b):
        return 200, chat_completion("Neither is any good.")
    return 200, chat_completion(
        f"A better answer says more.\nBetter: {'A' if len(a) > len(b) else 'B'}"
    )


def verdicts(url: str, **keys: Any) -> list[Verdict]:
    config = PairJudgeConfig(url=url, model="m", **keys)
    return asyncio.run(PairJudge("reward.judge", config).verdicts(PAIRS))


def test_both_orders_agree() -> None:
    with serve(prefers_longer) as server:
        assert verdicts(server.url) == ["a", "b", "unread"]
        assert len(server.requests) == 6


def test_one_order() -> None:
    with serve(prefers_longer) as server:
        assert verdicts(server.url, both_orders=False) == ["a", "b", "unread"]
        assert len(server.requests) == 3


def test_a_judge_that_follows_the_order_decides_nothing() -> None:
    with serve(lambda *_: (200, chat_completion("Better: **A**"))) as server:
        assert verdicts(server.url) == ["order"] * 3
        assert verdicts(server.url, both_orders=False) == ["a"] * 3


def test_nonsense_where_it_is_an_error() -> None:
    with (
        serve(prefers_longer) as server,
        pytest.raises(RlhfError, match=r"reward\.judge gave no A or B .* 'Neither is any good\.'"),
    ):
        verdicts(server.url, on_bad_answer="error")
