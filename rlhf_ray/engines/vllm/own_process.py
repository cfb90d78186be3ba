"""The death of an engine's own process, which its actor survives, as a failure of the actor."""

import asyncio
import re
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from rlhf_ray.errors import ActorFailure

T = TypeVar("T")

POLL_S = 1.0
"""Seconds between two looks at whether a process that owes an answer lives."""


@contextmanager
def lost_start_is_a_failure() -> Iterator[None]:
    """Report an engine that was killed, or was too slow, while it started: it may be tried again.

    Raises:
        ActorFailure: it was; an engine that refuses its arguments raises vLLM's own error.
    """
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        killed = re.search(r"Failed core proc\(s\): .*: -\d+", str(error))
        if killed or isinstance(error, TimeoutError) or "Timed out" in str(error):
            raise ActorFailure(f"vLLM's engine did not start: {error}") from error
        raise


async def while_alive(engine: AsyncLLM, doing: str, answer: Awaitable[T]) -> T:
    """Await an answer of an engine's process.

    vLLM ends requests for samples when that process dies, but leaves every other call, such as
    loading an adapter, without an answer.

    Raises:
        ActorFailure: the process has died.
    """
    task = asyncio.ensure_future(answer)
    try:
        while not (await asyncio.wait([task], timeout=POLL_S))[0]:
            if engine.errored:
                raise EngineDeadError
        return task.result()
    except EngineDeadError as error:
        raise ActorFailure(
            f"vLLM's engine process died while {doing}; see the end of the generator's log"
        ) from error
    finally:
        task.cancel()
