"""JSON over HTTP with deadlines, bounded concurrency and retries, for sources that are services."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import httpx
from tenacity import (
    AsyncRetrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from rlhf_ray.config.rewards import EndpointConfig
from rlhf_ray.errors import RlhfError
from rlhf_ray.rewards.together import together

LONGEST_WAIT_S = 30.0
"""Longest wait between two attempts; `EndpointConfig.longest_request_s` counts with it."""

TRY_AGAIN = {408, 429}
"""Statuses below 500 that say: later."""


class _Unavailable(Exception):
    """An attempt that may succeed when it is made again."""


class Endpoint:
    """One address that takes and gives JSON."""

    def __init__(self, name: str, url: str, settings: EndpointConfig) -> None:
        """
        Args:
            name: who asks, for messages.
            url: where requests are posted.
            settings: deadlines, retries, concurrency, key.
        """
        self._name = name
        self._url = url
        self._settings = settings
        key = os.environ.get(settings.api_key_env or "", "")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._tls = httpx.create_ssl_context()
        self._free = asyncio.Semaphore(settings.concurrency)

    async def post_all(self, bodies: Sequence[Any]) -> list[Any]:
        """The answers to all bodies, in their order; one that fails for good ends the others.

        Raises:
            RlhfError: the service refused a request, or stayed unavailable.
        """
        async with httpx.AsyncClient(
            headers=self._headers, timeout=None, verify=self._tls
        ) as client:
            return await together(self._post(client, body) for body in bodies)

    async def _post(self, client: httpx.AsyncClient, body: Any) -> Any:
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
                    "its timeout_s or retries; then run again: a run goes on from its last commit"
                ) from None

    async def _attempt(self, client: httpx.AsyncClient, body: Any) -> Any:
        timeout_s = self._settings.timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                response = await client.post(self._url, json=body)
        except TimeoutError:
            raise _Unavailable(f"no answer within {timeout_s:g} s") from None
        except httpx.RequestError as error:
            raise _Unavailable(f"{type(error).__name__}: {error}") from None
        said = f"status {response.status_code}: {response.text[:200]!r}"
        if response.status_code in TRY_AGAIN or response.status_code >= 500:
            raise _Unavailable(said)
        if not response.is_success:
            raise RlhfError(
                f"{self._name}: {self._url} refused the request with {said}. Check the url, the "
                "model's name and the key"
            )
        try:
            return response.json()
        except ValueError:
            raise _Unavailable(f"an answer that is no JSON ({said})") from None
