"""Reward servers: JSON over HTTP with deadlines and retries, and OpenRLHF's protocol on top."""

import asyncio
import os
from collections.abc import Sequence

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from rlhf_ray.config.rewards import EndpointConfig, RemoteSourceConfig
from rlhf_ray.errors import ConfigError, RlhfError
from rlhf_ray.rewards.functions import openrlhf_arguments
from rlhf_ray.rewards.source import together
from rlhf_ray.rewards.user_function import as_scores
from rlhf_ray.secrecy import redacted, remember
from rlhf_ray.types import Rollout

LONGEST_WAIT_S = 30.0
"""Longest wait between two attempts; `EndpointConfig.longest_request_s` relies on it."""

TRY_AGAIN = {408, 429}
"""Statuses below 500 after which a request is repeated (timeout, too many requests)."""


class _Unavailable(Exception):
    """A failed attempt that may succeed if repeated."""


class Endpoint:
    """An HTTP client for one address that takes and returns JSON."""

    def __init__(self, name: str, url: str, settings: EndpointConfig) -> None:
        """"""
        self._name = name
        self._url = url
        self._settings = settings
        key = _key_in(settings.api_key_env)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        # Once per endpoint: loading the certificates takes longer than a request.
        self._tls = httpx.create_ssl_context()
        self._free = asyncio.Semaphore(settings.concurrency)

    async def post_all(self, bodies: Sequence[object]) -> list[object]:
        """Post all bodies and return the answers in order; a final failure cancels the others."""
        async with httpx.AsyncClient(
            headers=self._headers, timeout=None, verify=self._tls
        ) as client:
            return await together(self._post(client, body) for body in bodies)

    async def _post(self, client: httpx.AsyncClient, body: object) -> object:
        settings = self._settings
        attempts = AsyncRetrying(
            stop=stop_after_attempt(1 + settings.retries),
            wait=wait_exponential(multiplier=settings.retry_wait_s, max=LONGEST_WAIT_S),
            retry=retry_if_exception_type(_Unavailable),
            reraise=True,
        )
        async with self._free:
            try:
                return await attempts(self._attempt, client, body)
            except _Unavailable as error:
                raise RlhfError(
                    f"{self._name}: {self._url} failed {1 + settings.retries} times, at last: "
                    f"{error}. See that the service runs and can be reached from here, or raise "
                    "its timeout_s or retries; then run again: the run resumes at its last commit"
                ) from None

    async def _attempt(self, client: httpx.AsyncClient, body: object) -> object:
        timeout_s = self._settings.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                response = await client.post(self._url, json=body)
        except TimeoutError:
            raise _Unavailable(f"no answer within {timeout_s:g} s") from None
        except httpx.RequestError as error:
            raise _Unavailable(f"{type(error).__name__}: {error}") from None
        # Redacted before it is cut and quoted: half a key that the server echoed stays a secret.
        status = f"status {response.status_code}: {redacted(response.text)[:200]!r}"
        if response.status_code in TRY_AGAIN or response.status_code >= 500:
            raise _Unavailable(status)
        if not response.is_success:
            raise RlhfError(
                f"{self._name}: {self._url} refused the request with {status}. Check the url, the "
                "model's name and the key"
            )
        try:
            return response.json()
        except ValueError:
            raise _Unavailable(f"an answer that is no JSON ({status})") from None


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
        self._endpoint = Endpoint(f"rewards: {config.name}", config.url, config)

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """Return [N] scores from the server."""
        size = self._config.batch_size
        batches = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        answers = await self._endpoint.post_all([self._body(batch) for batch in batches])
        pairs = zip(answers, batches, strict=True)
        return [score for answer, batch in pairs for score in self._scores(answer, len(batch))]

    def _body(self, rollouts: Sequence[Rollout]) -> dict[str, object]:
        queries, prompts, labels = openrlhf_arguments(rollouts, self._config.label_column)
        return {"query": queries, "prompts": prompts, "labels": labels}

    def _scores(self, answer: object, count: int) -> list[float | None]:
        config = self._config
        if not isinstance(answer, dict) or "rewards" not in answer:
            raise RlhfError(
                f"rewards: {config.name}: {config.url} answered {str(answer)[:200]}, expected an "
                'object with "rewards"; name the address of a server of OpenRLHF\'s protocol'
            )
        return as_scores(answer["rewards"], count, f"rewards: {config.name}: {config.url}")
