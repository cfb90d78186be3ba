"""One generator of a pool, and who starts and ends its process."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from rlhf_ray.roles import Generator
from rlhf_ray.types import AdapterUpdate, GeneratorState, GeneratorStatus

FOLLOWERS: Mapping[GeneratorState, frozenset[GeneratorState]] = {
    "starting": frozenset({"stale", "suspect", "retired"}),
    "stale": frozenset({"ready", "suspect", "retired"}),
    "ready": frozenset({"stale", "suspect", "retired"}),
    "suspect": frozenset({"dead", "retired"}),
    "dead": frozenset({"restarting", "retired"}),
    "restarting": frozenset({"starting", "retired"}),
    "retired": frozenset(),
}
"""State -> the states that may come next."""


class Life:
    """Where one generator is in its life; a new one is starting."""

    def __init__(self) -> None:
        self.state: GeneratorState = "starting"

    def to(self, state: GeneratorState) -> None:
        """Go on.

        Raises:
            RuntimeError: this state does not follow the one before.
        """
        if state not in FOLLOWERS[self.state]:
            raise RuntimeError(f"A generator that is {self.state} cannot become {state}")
        self.state = state


FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
"""Before a generator is started anew; twice as long after each failure without a shard between."""


GeneratorT = TypeVar("GeneratorT", bound=Generator)
"""The generators that a factory starts and can end."""


Serve = Callable[[Generator, AdapterUpdate], Awaitable[None]]
"""Publishes to one generator and checks what its engine then holds; raises WeightSyncError."""


class Factory(Protocol[GeneratorT]):
    """Starts and ends the processes of generators."""

    async def start(self, name: str) -> GeneratorT:
        """A generator that has loaded its base; leaves no process behind where that fails.

        Raises:
            PlacementError: there is no room for it.
        """
        ...

    async def end(self, generator: GeneratorT) -> None:
        """End a process, also one that does not answer or has died; never raises."""
        ...

    def make_room(self, num: int) -> None:
        """Have the cluster grow until so many generators fit, where it can."""
        ...


@dataclass(eq=False)
class Member(Generic[GeneratorT]):
    """What a pool knows of a generator."""

    name: str
    client: GeneratorT | None = None
    """None: it has no process."""
    life: Life = field(default_factory=Life)
    serves: AdapterUpdate | None = None
    restarts: int = 0
    failures: int = 0
    """Since it last finished a shard."""
    calls: set[asyncio.Future[Any]] = field(default_factory=set)
    """What it samples."""
    lacks_room: bool = False
    """Whether the cluster had no place for it when it was last tried."""
    change: asyncio.Future[None] | None = None
    """What starts, replaces or ends it, while that goes on."""

    @property
    def load(self) -> int:
        """Shards that it samples."""
        return len(self.calls)

    @property
    def is_up(self) -> bool:
        """Whether it can be talked to, and nobody else is about to change it."""
        return self.change is None and self.life.state in ("starting", "stale", "ready")

    def next_wait_s(self, first_s: float) -> float:
        """Before it is started anew after one more failure."""
        wait_s = min(first_s * 2**self.failures, LONGEST_WAIT_S)
        self.failures += 1
        return wait_s

    def status(self) -> GeneratorStatus:
        """As people see it."""
        version = self.serves.version if self.serves is not None else None
        return GeneratorStatus(self.name, self.life.state, version, self.restarts)


async def cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
