"""Sources that are services, against a real HTTP server on this machine."""

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from json_server import chat_completion, serve
from reward_services import QUICK, judge, rates_length, remote

from rlhf_ray.config.rewards import JudgeSourceConfig, RemoteSourceConfig
from rlhf_ray.errors import ConfigError, DataError, RlhfError
from rlhf_ray.rewards.judge import JudgeSource
from rlhf_ray.rewards.remote import RemoteSource
from rlhf_ray.types import Rollout

MakeRollout = Callable[..., Rollout]


@pytest.mark.parametrize("status", [401, 503])
def test_a_key_that_a_server_echoes_reaches_no_message(
    rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    key = "planted-k3y-of-the-server"
    monkeypatch.setenv("PLAIN_NAME", f"{key}\n")  # as from a file
    echo = "x" * 190 + key  # cut in the middle by a message that shows the beginning
    with serve(lambda *_: (status, {"error": [key, echo]})) as server:
        for call in (judge, remote):
            with pytest.raises(RlhfError) as error:
                call(server.url, [rollout("a")], api_key_env="PLAIN_NAME", retries=0)
            assert "planted" not in str(error.value)
        assert server.requests[0][1]["Authorization"] == f"Bearer {key}"


@pytest.mark.parametrize("key", ["planted\nk3y-abc", "planted k3y-abc", "plantéd-k3y-abc"])
def test_a_key_that_no_header_carries_is_refused_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setattr("os.environ", {**os.environ, "MY_KEY": key})
    config = RemoteSourceConfig(type="remote", url="http://localhost", api_key_env="MY_KEY")
    with pytest.raises(ConfigError, match="environment variable MY_KEY holds a line") as error:
        RemoteSource(config)
    assert "k3y" not in str(error.value)


class TestJudge:
    def test_good_answers_come_in_order(self, rollout: MakeRollout) -> None:
        with serve(rates_length) as server:
            rows = [rollout("x" * length) for length in (3, 10, 1, 7)]
            assert judge(server.url, rows) == [3.0, 10.0, 1.0, 7.0]
            assert {path for path, _, _ in server.requests} == {"/v1/chat/completions"}

    def test_what_is_asked(self, rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MY_KEY", "secret")
        keys = {
            "api_key_env": "MY_KEY",
            "system": "Be strict.",
            "template": "{level}|{prompt}|{response}|{lowest}-{highest}",
            "request": {"top_p": 0.5},
            "max_tokens": 8,
        }
        with serve(lambda *_: (200, chat_completion("rating 2"))) as server:
            judge(server.url, [rollout("{prompt}", "P", level=3)], **keys)
            _, headers, body = server.requests[0]
        assert headers["Authorization"] == "Bearer secret"
        assert body == {
            "model": "m",
            "messages": [
                {"role": "system", "content": "Be strict."},
                {"role": "user", "content": "3|P|{prompt}|1-10"},  # filled in once
            ],
            "temperature": 0.0,
            "max_tokens": 8,
            "top_p": 0.5,
        }

    def test_what_an_endpoint_refuses_is_left_out(self, rollout: MakeRollout) -> None:
        keys = {"temperature": None, "max_tokens": None, "request": {"max_completion_tokens": 9}}
        with serve(lambda *_: (200, chat_completion("rating 2"))) as server:
            assert judge(server.url, [rollout("a")], **keys) == [2.0]
            _, _, body = server.requests[0]
        assert sorted(body) == ["max_completion_tokens", "messages", "model"]

    def test_a_chat_is_shown_by_its_turns(self, rollout: MakeRollout) -> None:
        turns = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": "Why?"},
        ]
        rows = [rollout("R", "<|x|>", messages=turns), rollout("R", "<|x|>", messages=turns[:1])]
        with serve(lambda *_: (200, chat_completion("rating 2"))) as server:
            judge(server.url, rows, template="{prompt}#{response}")
            asked = sorted(body["messages"][0]["content"] for _, _, body in server.requests)
        assert asked == ["Hi#R", "user: Hi\n\nassistant: Hello\n\nuser: Why?#R"]

    @pytest.mark.parametrize("answer", ["no idea", "Rating: 11", "Rating: 0.5", "", None])
    def test_nonsense(self, rollout: MakeRollout, answer: str | None) -> None:
        rows = [rollout("a")]
        with serve(lambda *_: (200, chat_completion(answer))) as server:
            assert judge(server.url, rows) == [None]
            scored = judge(server.url, rows, on_bad_answer="score", bad_answer_score=-3.0)
            assert scored == [-3.0]
            with pytest.raises(RlhfError, match="judge gave no number from 1 to 10 that pattern"):
                judge(server.url, rows, on_bad_answer="error")

    @pytest.mark.parametrize("answer", ["Rating: -3", "**Rating:** -3/5", "rating 4? Rating:-3.0"])
    def test_a_negative_rating(self, rollout: MakeRollout, answer: str) -> None:
        with serve(lambda *_: (200, chat_completion(answer))) as server:
            assert judge(server.url, [rollout("a")], lowest=-5.0, highest=5.0) == [-3.0]

    @pytest.mark.parametrize(
        ("answer", "rating"),
        [
            ("Rating (1-10): 8", 8.0),
            ("**Rating (1 – 10):** 8.5/10", 8.5),
            ("Rating 1 to 10: 8", 8.0),
            ("Rating [1-10] 8", 8.0),
            ("Rating (1-10): good", None),
            ("Rating: 8 (of 1-10)", 8.0),
            ("Rating (8): good", 8.0),
            ("Rating: 8 - 2 examples are missing", 8.0),
        ],
    )
    def test_a_scale_is_no_rating(
        self, rollout: MakeRollout, answer: str, rating: float | None
    ) -> None:
        with serve(lambda *_: (200, chat_completion(answer))) as server:
            assert judge(server.url, [rollout("a")]) == [rating]

    def test_a_pattern_whose_group_is_no_number(self, rollout: MakeRollout) -> None:
        with serve(lambda *_: (200, chat_completion("grade A"))) as server:
            assert judge(server.url, [rollout("a")], pattern=r"grade (\w)") == [None]

    def test_an_unknown_name_in_the_template(self, rollout: MakeRollout) -> None:
        with pytest.raises(DataError, match="judge reads the column 'answer'"):
            judge("http://127.0.0.1:9", [rollout("a")], template="{response} {answer}")

    def test_an_answer_in_parts(self, rollout: MakeRollout) -> None:
        parts = [{"type": "text", "text": "Rating:"}, {"type": "image"}, {"text": " 4"}]
        answer = {"choices": [{"message": {"role": "assistant", "content": parts}}]}
        with serve(lambda *_: (200, answer)) as server:
            assert judge(server.url, [rollout("a")]) == [4.0]

    @pytest.mark.parametrize(
        "refusal",
        [
            (400, {"error": {"code": "content_filter"}}),
            (413, "too long"),
            (200, {"error": {"code": 400, "message": "context length"}}),
            (200, {"choices": []}),  # after the retries
        ],
    )
    def test_a_refusal_of_one_of_many_is_a_bad_answer(
        self, rollout: MakeRollout, refusal: tuple[int, Any]
    ) -> None:
        def answer(number: int, body: Any) -> tuple[int, Any]:
            if "refused" in body["messages"][0]["content"]:
                return refusal
            return 200, chat_completion("Rating: 3")

        rows = [rollout(text) for text in ("a", "refused", "b")]
        with serve(answer) as server:
            assert judge(server.url, rows) == [3.0, None, 3.0]
            scored = judge(server.url, rows, on_bad_answer="score", bad_answer_score=0.0)
            assert scored == [3.0, 0.0, 3.0]
            with pytest.raises(RlhfError, match=r"rewards: judge .*\. Set on_bad_answer to skip"):
                judge(server.url, rows, on_bad_answer="error")

    def test_a_source_that_has_answered_before_may_refuse_a_whole_shard(
        self, rollout: MakeRollout
    ) -> None:
        answers = iter([(200, chat_completion("Rating: 3")), (400, "filtered")])
        with serve(lambda *_: next(answers)) as server:
            url = f"{server.url}/v1"
            source = JudgeSource(JudgeSourceConfig(type="judge", url=url, model="m", **QUICK))
            assert asyncio.run(source.score([rollout("a")])) == [3.0]
            assert asyncio.run(source.score([rollout("b")])) == [None]

    def test_another_protocol(self, rollout: MakeRollout) -> None:
        with (
            serve(lambda *_: (200, {"rewards": [1]})) as server,
            pytest.raises(RlhfError, match="did not answer with a chat completion but"),
        ):
            judge(server.url, [rollout("a")])

    def test_requests_go_out_together_but_no_more_than_allowed(self, rollout: MakeRollout) -> None:
        with serve(rates_length, delay_s=0.05) as server:
            started = time.monotonic()
            judge(server.url, [rollout("xy")] * 12, concurrency=4)
            seconds = time.monotonic() - started
        assert server.most_at_once == 4
        assert seconds < 12 * 0.05  # three rounds of four, not one after the other


class TestRemote:
    def test_good_answers_in_batches(self, rollout: MakeRollout) -> None:
        def lengths(number: int, body: Any) -> tuple[int, Any]:
            return 200, {"rewards": [len(query) for query in body["query"]]}

        rows = [rollout("x" * length, "ab", label=length) for length in (1, 4, 2)]
        with serve(lengths) as server:
            assert remote(server.url, rows, batch_size=2, concurrency=1) == [3.0, 6.0, 4.0]
            bodies = [body for _, _, body in server.requests]
        assert bodies == [
            {"query": ["abx", "abxxxx"], "prompts": ["ab", "ab"], "labels": [1, 4]},
            {"query": ["abxx"], "prompts": ["ab"], "labels": [2]},
        ]

    @pytest.mark.parametrize(
        ("answer", "says"),
        [
            ({"scores": [1]}, r"answered \{'scores': \[1\]\}, expected an object with \"rewards\""),
            ([1.0], "answered .*expected an object"),
            ({"rewards": [1.0, 2.0]}, "gave 2 scores for 1 responses"),
            ({"rewards": ["high"]}, "gave 'high' as a score"),
        ],
    )
    def test_nonsense(self, rollout: MakeRollout, answer: Any, says: str) -> None:
        with serve(lambda *_: (200, answer)) as server, pytest.raises(RlhfError, match=says):
            remote(server.url, [rollout("a")])

    def test_nested_and_missing_scores(self, rollout: MakeRollout) -> None:
        with serve(lambda *_: (200, {"rewards": [[0.5], None]})) as server:
            assert remote(server.url, [rollout("a"), rollout("b")]) == [0.5, None]

    def test_a_batch_that_is_refused_for_one_text_is_sent_one_by_one(
        self, rollout: MakeRollout
    ) -> None:
        def answer(number: int, body: Any) -> tuple[int, Any]:
            if any("bad" in query for query in body["query"]):
                return 400, "unsafe"
            return 200, {"rewards": [1.0] * len(body["query"])}

        rows = [rollout(text) for text in ("a", "bad", "b")]
        with serve(answer) as server:
            assert remote(server.url, rows, on_bad_score="skip") == [1.0, None, 1.0]
            with pytest.raises(RlhfError, match="status 400: 'unsafe', for a response to prompt 7"):
                remote(server.url, rows)
