"""One way to call a role's process, whatever it is: a Ray actor, or an object in this process.

A method that makes data for other roles returns ``(data, scalars)``; ``call_split`` keeps the data
where it is and brings the scalars.
"""

import inspect
import time
from collections.abc import Callable
from typing import Any, Protocol

from rlhf_ray.types import Handle

LOOPBACK = "127.0.0.1"

OnCall = Callable[[str, str, float, float], None]
"""(worker, method, start, end in Unix seconds), after each call."""


class Worker(Protocol):
    """A process of a role."""

    name: str

    async def address(self) -> str:
        """Where the machine of this process is reached by others of its group."""
        ...

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method and bring its result. Handles among ``args`` arrive as data."""
        ...

    async def call_split(self, method: str, *args: Any) -> tuple[Handle, Any]:
        """Call a method that returns (data, scalars); the data stays away, the scalars come."""
        ...


class InlineWorker:
    """A role in this process: no Ray, no deadline, calls one after the other."""

    def __init__(self, name: str, instance: Any, on_call: OnCall) -> None:
        self.name = name
        self._instance = instance
        self._on_call = on_call

    async def address(self) -> str:
        """This machine, by loopback."""
        return LOOPBACK

    async def call(self, method: str, *args: Any) -> Any:
        """Call the method here and now."""
        started = time.time()
        result = getattr(self._instance, method)(*args)
        if inspect.isawaitable(result):
            result = await result
        self._on_call(self.name, method, started, time.time())
        return result

    async def call_split(self, method: str, *args: Any) -> tuple[Handle, Any]:
        """The data is its own handle."""
        data, scalars = await self.call(method, *args)
        return data, scalars
