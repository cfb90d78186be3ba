"""How a process of a role is called.

A process is a Ray actor or an object in this process; both are a `Worker`. A method that makes data
for other roles returns ``(data, scalars)``; `Worker.call_split` leaves the data where it is and
brings the scalars.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Concatenate, Generic, ParamSpec, Protocol, TypeVar, cast

from rlhf_ray.errors import ActorFailure, DataLost
from rlhf_ray.observability.phases import Stalled, while_it_moves
from rlhf_ray.observability.tracing import unix_now
from rlhf_ray.types import Handle

LOOPBACK = "127.0.0.1"
FETCH_TIMEOUT_S = 600.0
"""Time for data on the driver's own node, which may have been spilled to its disk."""

OnCall = Callable[[str, str, float, float], None]
"""Called after each call with worker, method, start and end (Unix seconds)."""

P = ParamSpec("P")
DataT = TypeVar("DataT")
ScalarsT = TypeVar("ScalarsT")
ResultT = TypeVar("ResultT")
ProcessT_co = TypeVar("ProcessT_co", covariant=True)

Method = Callable[Concatenate[ProcessT_co, P], Awaitable[ResultT] | ResultT]
"""A method of a process, async or not. Calls name it by the function, never by a string: pyright
then checks the arguments, and that the actor class has it where `stages` makes the client."""


class Worker(Protocol[ProcessT_co]):
    """A process of a role."""

    name: str

    async def address(self) -> str:
        """Return the address under which its group reaches the machine of this process."""
        ...

    async def call(
        self, method: Method[ProcessT_co, P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> ResultT:
        """Call a method and bring its result. Handles among ``args`` arrive as data."""
        ...

    async def call_split(
        self,
        method: Method[ProcessT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[Handle[DataT], ScalarsT]:
        """Call a method that returns (data, scalars); leave the data, bring the scalars."""
        ...

    async def hold(self, data: DataT) -> Handle[DataT]:
        """Return a handle to the driver's data, for calls of this process and others like it."""
        ...


def arriving(handle: Handle[DataT] | DataT) -> DataT:
    """Pass a handle as an argument of a call: Ray puts the data in its place.

    Only top-level arguments are resolved, never handles within a list: hence `Learner.assemble`
    takes its columns one by one.
    """
    return cast("DataT", handle)


async def fetch(handle: Handle[DataT]) -> DataT:
    """Bring data to the driver; inline it is there already.

    Raises:
        DataLost: it does not come, though `Worker.call_split` had a copy on the driver's node.
    """
    if not inspect.isawaitable(handle):
        return arriving(handle)
    from ray.exceptions import RayError  # inline there are no handles, and no Ray

    try:
        async with asyncio.timeout(FETCH_TIMEOUT_S):
            return await cast("Awaitable[DataT]", handle)
    except TimeoutError:
        raise DataLost(
            f"Data on the driver's node did not come within {FETCH_TIMEOUT_S:g} s; see whether its "
            "disk, to which the object store spills, works. Run again: the run resumes at its last "
            "commit"
        ) from None
    except RayError as error:
        raise DataLost(
            f"Data on the driver's node was lost: {error}. Run again: the run resumes at its last "
            "commit"
        ) from error


class InlineWorker(Generic[ProcessT_co]):
    """A role in this process: no Ray, calls one after the other.

    What a call awaits has the deadline, such as a service or a user's function; any progress of
    this process renews it. What computes in this thread cannot be interrupted.
    """

    def __init__(
        self,
        name: str,
        instance: ProcessT_co,
        on_call: OnCall,
        timeout_s: float | None = None,
    ) -> None:
        self.name = name
        self._timeout_s = timeout_s
        self._instance = instance
        self._on_call = on_call

    async def address(self) -> str:
        """Return the loopback address."""
        return LOOPBACK

    async def call(
        self, method: Method[ProcessT_co, P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> ResultT:
        """Call the method here and now."""
        started = unix_now()
        # By name: `method` may be a Protocol's, which the instance implements.
        result = getattr(self._instance, method.__name__)(*args, **kwargs)
        if inspect.isawaitable(result):
            try:
                result = await while_it_moves(result, self._timeout_s, "cluster.call_timeout_s")
            except Stalled as stalled:
                raise ActorFailure(
                    f"{self.name} did not answer {method.__name__}, {stalled}"
                ) from None
        self._on_call(self.name, method.__name__, started, unix_now())
        return result

    async def call_split(
        self,
        method: Method[ProcessT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[Handle[DataT], ScalarsT]:
        """Call the method; the data is its own handle."""
        data, scalars = await self.call(method, *args, **kwargs)
        return cast("Handle[DataT]", data), scalars

    async def hold(self, data: DataT) -> Handle[DataT]:
        """Return the data, which is its own handle."""
        return cast("Handle[DataT]", data)
