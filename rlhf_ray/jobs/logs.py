"""What a job prints, as its job server sends it."""

import asyncio
from collections.abc import AsyncIterator, Iterator

QUIET_S = 60.0
"""Without text for so long a connection may be dead."""


class Quiet(Exception):
    """Nothing came for `QUIET_S`: the run prints nothing, or the connection was cut unseen, as by
    a machine that slept."""


def texts(stream: AsyncIterator[str], skip: int) -> Iterator[str]:
    """One connection's text, less the first ``skip`` characters, until the server ends it.

    Raises:
        Quiet: Ray's client would wait for ever.
    """
    with asyncio.Runner() as runner:
        while (text := runner.run(_next(stream))) is not None:
            rest, skip = text[skip:], max(0, skip - len(text))
            if rest:
                yield rest


async def _next(stream: AsyncIterator[str]) -> str | None:
    deadline = asyncio.timeout(QUIET_S)
    try:
        async with deadline:
            return await anext(stream, None)
    except TimeoutError as error:
        if deadline.expired():
            raise Quiet from error
        raise  # the connection's own
