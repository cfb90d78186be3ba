"""Reward servers: JSON over HTTP with deadlines and retries, and OpenRLHF's protocol on top."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
)

from rlhf_ray.config.rewards import EndpointConfig, RemoteSourceConfig
from rlhf_ray.errors import ConfigError, RlhfError
from rlhf_ray.observability.phases import count
from rlhf_ray.rewards.functions import openrlhf_arguments
from rlhf_ray.rewards.source import together
from rlhf_ray.rewards.user_function import as_scores
from rlhf_ray.secrecy import redacted, remember
from rlhf_ray.types import Rollout

LONGEST_WAIT_S = 30.0
"""Longest wait between two attempts that a service does not ask for itself;
`EndpointConfig.longest_request_s` relies on it."""
LONGEST_RETRY_AFTER_S = 300.0
"""Longest wait that a service may ask for with ``Retry-After``."""
LARGEST_ANSWER, LARGEST_COMPRESSED_ANSWER = 2**23, 2**16
"""Bytes of an answer that are read; of a compressed one, which may grow a thousandfold."""

TRY_AGAIN = {408, 429}
"""Statuses below 500 after which a request is repeated (timeout, too many requests)."""
REFUSES_ONE = {400, 403, 413, 422, 451}
"""Statuses that may be about one request's text: its length, or a content filter."""


@dataclass(frozen=True)
class Refused:
    """Why a service that answers other requests gives no answer to this one."""

    message: str


class Unavailable(Exception):
    """A failed attempt that may succeed if repeated."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s  # that the service asks for


class UnusableError(Unavailable):
    """An answer of success without what was asked for, such as one that reports an error."""


def beginning(answer: object) -> str:
    """Return how an answer begins, for a message.

    Redacted before it is cut and quoted: half a key that the server echoed stays a secret.
    """
    return redacted(str(answer))[:200]


class Endpoint:
    """An HTTP client for one address that takes and returns JSON."""

    def __init__(
        self,
        name: str,
        url: str,
        settings: EndpointConfig,
        check: Callable[[object], None] = lambda _: None,
    ) -> None:
        """
        Args:
            name: who sends the requests, for messages.
            url: where requests are posted.
            settings: deadlines, retries, concurrency, key.
            check: raises `UnusableError` for an answer that may be better the next time.
        """
        self._name = name
        self._url = url
        self._settings = settings
        self._check = check
        key = _key_in(settings.api_key_env)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Once per endpoint: loading the certificates takes longer than a request.
        self._tls = httpx.create_ssl_context()
        self._free = asyncio.Semaphore(settings.concurrency)
        self._has_answered = False

    async def post_all(self, bodies: Sequence[object]) -> list[object | Refused]:
        """Post all bodies and return the answers in order; a final failure cancels the others."""
        async with httpx.AsyncClient(
            headers={"Accept-Encoding": "identity", **self._headers},
            timeout=None,
            verify=self._tls,
            event_hooks={"response": [_limit_size]},
        ) as client:
            return await together(self._post(client, body) for body in bodies)

    def require_an_answer(self, answers: Sequence[object | Refused]) -> None:
        """Raise an error if the service has refused every request so far: then none is at fault."""
        refused = [answer for answer in answers if isinstance(answer, Refused)]
        self._has_answered |= len(refused) < len(answers)
        if refused and not self._has_answered:
            raise RlhfError(
                f"{self._name}: {self._url} {refused[0].message}. Check the url, the model's name "
                "and the key"
            )

    async def _post(self, client: httpx.AsyncClient, body: object) -> object | Refused:
        settings = self._settings
        backoff = wait_exponential(multiplier=settings.retry_wait_s, max=LONGEST_WAIT_S)
        attempts = AsyncRetrying(
            stop=stop_after_attempt(1 + settings.retries),
            wait=lambda state: max(backoff(state), _requested_wait_s(state)),
            retry=retry_if_exception(_may_succeed_later),
            before_sleep=self._warn_of_a_long_wait,
            reraise=True,
        )
        async with self._free:
            try:
                return await attempts(self._attempt, client, body)
            except UnusableError as error:
                return Refused(f"gave no usable answer {1 + settings.retries} times: {error}")
            except Unavailable as error:
                if error.wait_s > LONGEST_RETRY_AFTER_S:
                    raise RlhfError(
                        f"{self._name}: {self._url} asks to be left alone for {error.wait_s:g} s "
                        f"({error}); run again then: the run resumes at its last commit"
                    ) from None
                raise RlhfError(
                    f"{self._name}: {self._url} failed {1 + settings.retries} times, at last: "
                    f"{error}. See that the service runs and can be reached from here, or raise "
                    "its timeout_s or retries; then run again: the run resumes at its last commit"
                ) from None

    def _warn_of_a_long_wait(self, state: RetryCallState) -> None:
        if (wait_s := state.upcoming_sleep) > LONGEST_WAIT_S and state.outcome:
            logging.warning(
                f"{self._name}: {self._url} asks to be left alone for {wait_s:.0f} s "
                f"({state.outcome.exception()})"
            )

    async def _attempt(self, client: httpx.AsyncClient, body: object) -> object | Refused:
        timeout_s = self._settings.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                response = await client.post(self._url, json=body)
        except TimeoutError:
            raise Unavailable(f"no answer within {timeout_s:g} s") from None
        except httpx.RequestError as error:
            raise Unavailable(f"{type(error).__name__}: {error}") from None
        count(1, "requests answered")  # also by a service that asks to be left alone for a while
        status = f"status {response.status_code}: {beginning(response.text)!r}"
        if response.status_code in TRY_AGAIN or response.status_code >= 500:
            raise Unavailable(status, _retry_after_s(response.headers.get("Retry-After")))
        if response.status_code in REFUSES_ONE:
            return Refused(f"refused the request with {status}")
        if not response.is_success:
            raise RlhfError(
                f"{self._name}: {self._url} refused the request with {status}. Check the url, the "
                "model's name and the key"
            )
        try:
            answer = response.json()
        except (ValueError, RecursionError):  # nested too deeply
            raise Unavailable(f"an answer that is no JSON ({status})") from None
        return self._checked(answer)

    def _checked(self, answer: object) -> object | Refused:
        match answer:
            case {"error": {"code": int() as code} as error} if code in REFUSES_ONE:
                return Refused(f"refused the request with the error {beginning(error)}")
            case {"error": error} if error:
                raise UnusableError(f"the error {beginning(error)}")
            case {"object": "error"}:
                raise UnusableError(f"the error {beginning(answer)}")
        self._check(answer)
        return answer


async def _limit_size(response: httpx.Response) -> None:
    compressed = response.headers.get("Content-Encoding", "identity") != "identity"
    limit = LARGEST_COMPRESSED_ANSWER if compressed else LARGEST_ANSWER
    assert isinstance(response.stream, httpx.AsyncByteStream)
    response.stream = _Limited(response.stream, limit)


class _Limited(httpx.AsyncByteStream):
    """The bytes of an answer, as long as they are not too many."""

    def __init__(self, stream: httpx.AsyncByteStream, limit: int) -> None:
        self._stream = stream
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > self._limit:
                raise UnusableError(f"an answer of more than {self._limit} bytes")
            yield chunk

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()


def _may_succeed_later(error: BaseException) -> bool:
    return isinstance(error, Unavailable) and error.wait_s <= LONGEST_RETRY_AFTER_S


def _requested_wait_s(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return error.wait_s if isinstance(error, Unavailable) else 0.0


def _retry_after_s(header: str | None) -> float:
    """Return the seconds that ``Retry-After`` asks for: a number, or a date."""
    if header is None:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _key_in(variable: str | None) -> str:
    """Return the key that an environment variable holds; empty without one.

    Raises:
        ConfigError: no HTTP header can carry it.
    """
    key = os.environ.get(variable or "", "").strip()  # `export KEY=$(cat file)` may end a line
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(
            f"The environment variable {variable} holds a line break, a space or a character "
            "outside ASCII, which no HTTP header carries; export the key again"
        )
    remember(key)
    return key


class RemoteSource:
    """Scores by a server of OpenRLHF's protocol, several responses per request.

    Request: ``{"query": [prompt + response, ...], "prompts": [...], "labels": [...]}``; answer:
    ``{"rewards": [number, ...]}``.
    """

    def __init__(self, config: RemoteSourceConfig) -> None:
        self._config = config
        self._who = f"rewards: {config.name}: {config.url}"
        name = f"rewards: {config.name}"
        self._endpoint = Endpoint(name, config.url, config, _check_rewards)

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return [N] scores from the server."""
        size = self._config.batch_size
        batches = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        parts: list[tuple[object | Refused, Sequence[Rollout]]] = []
        for answer, batch in await self._answers(batches):
            # A batch may be refused because of one of its texts.
            alone = isinstance(answer, Refused) and len(batch) > 1
            parts += await self._answers([[row] for row in batch]) if alone else [(answer, batch)]
        self._endpoint.require_an_answer([answer for answer, _ in parts])
        return [score for answer, batch in parts for score in self._scores(answer, batch)]

    async def _answers(
        self, batches: Sequence[Sequence[Rollout]]
    ) -> list[tuple[object | Refused, Sequence[Rollout]]]:
        answers = await self._endpoint.post_all([self._body(batch) for batch in batches])
        return list(zip(answers, batches, strict=True))

    def _body(self, rollouts: Sequence[Rollout]) -> dict[str, object]:
        queries, prompts, labels = openrlhf_arguments(rollouts, self._config.label_column)
        return {"query": queries, "prompts": prompts, "labels": labels}

    def _scores(self, answer: object | Refused, rollouts: Sequence[Rollout]) -> list[float | None]:
        if isinstance(answer, Refused):
            if self._config.on_bad_score == "skip":
                return [None]
            raise RlhfError(
                f"{self._who} {answer.message}, for a response to prompt {rollouts[0].prompt.id}. "
                "Set on_bad_score: skip to count such a score as missing"
            )
        if not isinstance(answer, dict) or "rewards" not in answer:
            raise RlhfError(
                f"{self._who} answered {beginning(answer)}, expected an object with "
                '"rewards"; name the address of a server of OpenRLHF\'s protocol'
            )
        return as_scores(answer["rewards"], len(rollouts), self._who)


def _check_rewards(answer: object) -> None:
    if isinstance(answer, dict) and answer.get("rewards", 0) in (None, []):
        raise UnusableError(f"no rewards in {beginning(answer)}")
