"""What a reward source is, and what all of them read of a rollout."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Protocol, TypeVar

from rlhf_ray.data.reading.chats import Message
from rlhf_ray.errors import DataError
from rlhf_ray.types import Prompt, Rollout

T = TypeVar("T")


class Source(Protocol):
    """Rates responses; built once, in the process of a reward scorer."""

    async def score(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """[N] raw scores; None: this source does not apply to that response.

        Raises:
            RlhfError: naming the source, what is wrong and the remedy.
        """
        ...


class Blocking:
    """Runs blocking work in a thread of its own, one call after the other.

    The event loop stays free meanwhile, so that other sources' requests go on.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def __call__(self, work: Callable[..., T], *args: Any, **named: Any) -> T:
        """What ``work`` returns or raises."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, partial(work, *args, **named))


def messages_of(prompt: Prompt) -> list[Message] | None:
    """The turns before the response, where the row was a chat."""
    return prompt.fields.get("messages") or None


def column_of(prompt: Prompt, column: str, source: str) -> Any:
    """The cell of a column of the prompt's row.

    Raises:
        DataError: the row has no such column, or nothing in it.
    """
    value = prompt.fields.get(column)
    if value is None:
        raise DataError(
            f"rewards: {source} reads the column {column!r}, which prompt {prompt.id} lacks; it "
            f"has {', '.join(prompt.fields) or 'no further columns'}. Name the column in the "
            "source, or map it in the data set's columns"
        )
    return value
