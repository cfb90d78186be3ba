"""What a service may do to the source that asks it: fail, wait, refuse, answer too much."""

import asyncio
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import httpx
import pytest
from json_server import Answer, chat_completion, serve
from reward_services import QUICK, judge, rates_length, remote

from actors.reward_scorer import RewardScorer
from rlhf_ray.config.rewards import RemoteSourceConfig
from rlhf_ray.errors import RlhfError
from rlhf_ray.rewards.remote import RemoteSource
from rlhf_ray.types import Rollout

MakeRollout = Callable[..., Rollout]


class TestService:
    """Behaviour that judge and remote share."""

    def test_it_is_asked_again_after_a_failure(self, rollout: MakeRollout) -> None:
        failures = [(500, "boom"), (429, {}), (200, "<html>"), (503, "")]
        failures += [(200, {"error": "busy"}), (200, {"rewards": []}), (200, "[" * 200_000)]
        failures += [(200, {"object": "error", "message": "busy", "code": 503})]  # vLLM's

        def answer(number: int, body: Any) -> tuple[int, Any]:
            return failures[number] if number < 8 else (200, {"rewards": [2.0]})

        with serve(answer) as server:
            assert remote(server.url, [rollout("a")], retries=8) == [2.0]
            assert len(server.requests) == 9

    def test_a_judge_is_asked_again_after_an_empty_answer(self, rollout: MakeRollout) -> None:
        failures = [{"error": {"message": "overloaded"}}, {"choices": []}, {"choices": None}]

        def answer(number: int, body: Any) -> tuple[int, Any]:
            return 200, failures[number] if number < 3 else chat_completion("Rating: 3")

        with serve(answer) as server:
            assert judge(server.url, [rollout("a")]) == [3.0]
            assert len(server.requests) == 4

    def test_retry_after_is_obeyed(self, rollout: MakeRollout) -> None:
        def answer(number: int, body: Any) -> Answer:
            if number < 2:
                later = "1" if number else formatdate(time.time() + 2, usegmt=True)
                return 429, "", {"Retry-After": later}
            return 200, {"rewards": [2.0]}

        started = time.monotonic()
        with serve(answer) as server:
            assert remote(server.url, [rollout("a")]) == [2.0]
        assert 1.9 < time.monotonic() - started < 6  # a date has whole seconds

    def test_a_long_wait_that_a_service_asks_for_is_said(
        self, rollout: MakeRollout, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = RemoteSourceConfig(type="remote", url="http://x")
        settings = config.model_copy(update=QUICK)
        with serve(lambda *_: (429, "busy", {"Retry-After": "40"})) as server:
            source = RemoteSource(settings.model_copy(update={"url": server.url}))
            scorer = RewardScorer("reward-0", [config], lambda: {"remote": source}, limit_s=0.5)
            scorer.start()
            with pytest.raises(RlhfError, match="remote did not score a shard of 1 responses"):
                asyncio.run(scorer.score([rollout("a")]))
        assert f"{server.url} asks to be left alone for 40 s (status 429: 'busy')" in caplog.text

    def test_waits_that_a_service_asks_for_do_not_add_up_to_a_hang(
        self, rollout: MakeRollout
    ) -> None:
        def answer(number: int, body: Any) -> Answer:
            busy = (429, "busy", {"Retry-After": "1"})
            return busy if number < 3 else (200, {"rewards": [2.0]})

        config = RemoteSourceConfig(type="remote", url="http://x")
        with serve(answer) as server:
            source = RemoteSource(config.model_copy(update={**QUICK, "url": server.url}))
            scorer = RewardScorer("reward-0", [config], lambda: {"remote": source}, limit_s=2.0)
            scorer.start()
            assert asyncio.run(scorer.score([rollout("a")])) == {"remote": (2.0,)}

    def test_a_service_that_asks_for_an_hour_is_not_waited_for(self, rollout: MakeRollout) -> None:
        with (
            serve(lambda *_: (503, "closed", {"Retry-After": "3600"})) as server,
            pytest.raises(RlhfError, match=r"asks to be left alone for 3600 s"),
        ):
            remote(server.url, [rollout("a")])

    @pytest.mark.parametrize("compressed", [False, True])
    def test_an_answer_without_end_is_not_read(
        self, rollout: MakeRollout, monkeypatch: pytest.MonkeyPatch, compressed: bool
    ) -> None:
        monkeypatch.setattr("rlhf_ray.rewards.remote.LARGEST_ANSWER", 1000)
        monkeypatch.setattr("rlhf_ray.rewards.remote.LARGEST_COMPRESSED_ANSWER", 10)
        headers = {"Content-Encoding": "gzip"} if compressed else {}
        with (
            serve(lambda *_: (200, " " * 2000, headers)) as server,
            pytest.raises(RlhfError, match="an answer of more than 10"),
        ):
            remote(server.url, [rollout("a")], retries=0)

    def test_a_slow_answer_is_waited_for(self, rollout: MakeRollout) -> None:
        with serve(rates_length, delay_s=0.1) as server:
            assert judge(server.url, [rollout("xyz")]) == [3.0]

    def test_an_answer_that_does_not_come_in_time(self, rollout: MakeRollout) -> None:
        with (
            serve(rates_length, delay_s=0.2) as server,
            pytest.raises(RlhfError, match=r"failed 2 times, at last: no answer within 0\.05 s"),
        ):
            judge(server.url, [rollout("xyz")], timeout_s=0.05, retries=1)

    def test_one_that_stays_down_ends_in_one_clear_error(self, rollout: MakeRollout) -> None:
        with serve(lambda *_: (500, "out of memory")) as server:
            with pytest.raises(
                RlhfError,
                match=r"judge: .* failed 3 times, at last: status 500: "
                "'out of memory'. See that the service runs",
            ):
                judge(server.url, [rollout("a")] * 6, retries=2)
            assert len(server.requests) <= 18

    def test_nobody_there(self, rollout: MakeRollout) -> None:
        with serve(rates_length) as server:
            url = server.url
        with pytest.raises(RlhfError, match=r"remote: .* failed 2 times, at last: ConnectError"):
            remote(url, [rollout("a")], retries=1)

    @pytest.mark.parametrize("kind", [httpx.ReadError, httpx.DecodingError, httpx.TooManyRedirects])
    def test_an_answer_that_cannot_be_read(
        self,
        rollout: MakeRollout,
        monkeypatch: pytest.MonkeyPatch,
        kind: type[httpx.RequestError],
    ) -> None:
        async def fail(*_: Any, **__: Any) -> None:
            raise kind("garbled")

        monkeypatch.setattr(httpx.AsyncClient, "post", fail)
        with pytest.raises(RlhfError, match=f"failed 2 times, at last: {kind.__name__}: garbled"):
            remote("http://127.0.0.1:9", [rollout("a")], retries=1)

    @pytest.mark.parametrize("status", [400, 401, 404])
    def test_a_refusal_is_not_tried_again(self, rollout: MakeRollout, status: int) -> None:
        with serve(lambda *_: (status, "no such model")) as server:
            with pytest.raises(RlhfError, match=f"refused the request with status {status}: 'no "):
                judge(server.url, [rollout("a")])
            assert len(server.requests) == 1

    def test_the_first_failure_ends_the_others(self, rollout: MakeRollout) -> None:
        """One request is refused at once while the others would be tried for seconds."""

        def answer(number: int, body: Any) -> tuple[int, Any]:
            return (401, "no") if body["query"] == ["Why? bad"] else (500, "")

        rows = [rollout(text) for text in ("a", "b", "bad")]
        started = time.monotonic()
        with serve(answer) as server, pytest.raises(RlhfError, match="status 401"):
            remote(server.url, rows, batch_size=1, retry_wait_s=5.0)
        assert time.monotonic() - started < 4
