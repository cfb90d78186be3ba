"""One generator of a pool: its state machine, its restarts, and the factory of its process."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from rlhf_ray.errors import ActorFailure, WeightSyncError
from rlhf_ray.observability.repeated import GrowingWait
from rlhf_ray.roles import Generator, Proof
from rlhf_ray.types import AdapterUpdate, GeneratorState, GeneratorStatus

TRANSITIONS: Mapping[GeneratorState, frozenset[GeneratorState]] = {
    "starting": frozenset({"stale", "suspect", "retired"}),
    "stale": frozenset({"ready", "suspect", "retired"}),
    "ready": frozenset({"stale", "suspect", "retired"}),
    "suspect": frozenset({"dead", "retired"}),
    "dead": frozenset({"restarting", "retired"}),
    "restarting": frozenset({"starting", "retired"}),
    "retired": frozenset(),
}
"""State -> the states that may follow. Only a stale generator becomes ready: no path to the first
prompt bypasses the proof and the publication."""


GeneratorT = TypeVar("GeneratorT", bound=Generator)
"""The type of generator that a factory starts and ends."""


Serve = Callable[[Generator, AdapterUpdate], Awaitable[None]]
"""Publishes to one generator and checks what its engine then holds. Raises WeightSyncError."""


class Factory(Protocol[GeneratorT]):
    """Starts and ends the processes of generators."""

    async def start(self, name: str) -> GeneratorT:
        """Start a generator and return it with its base loaded; on failure leave no process behind.

        Raises:
            PlacementError: the cluster has no capacity for it.
        """
        ...

    async def load(self, generator: GeneratorT) -> None:
        """Load the base of a generator whose process was made before."""
        ...

    async def end(self, generator: GeneratorT) -> None:
        """End its process, even if it does not answer or has died. Never raises."""
        ...

    def request_capacity(self, num: int) -> None:
        """Request capacity for ``num`` generators from a cluster that can grow."""
        ...


@dataclass(eq=False)
class Member(Generic[GeneratorT]):
    """A generator as its pool sees it."""

    name: str
    client: GeneratorT | None = None
    """None while it has no process."""
    state: GeneratorState = "starting"
    serves: AdapterUpdate | None = None
    restarts: int = 0
    wait: GrowingWait | None = None
    """Before its next restart; None: it has finished a shard since the last one."""
    calls: set[asyncio.Future[Any]] = field(default_factory=set)
    """The running calls, one per shard."""
    lacks_capacity: bool = False
    """Whether its last start failed because the cluster had no capacity."""
    change: asyncio.Future[None] | None = None
    """The task that is starting, replacing or ending it; None if there is none."""

    def change_to(self, state: GeneratorState) -> None:
        """Change the state.

        Raises:
            RuntimeError: `TRANSITIONS` does not allow it.
        """
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(f"A generator that is {self.state} cannot become {state}")
        self.state = state

    @property
    def process(self) -> GeneratorT:
        """Its process, where it has one."""
        assert self.client is not None
        return self.client

    @property
    def load(self) -> int:
        """Number of shards that it is sampling."""
        return len(self.calls)

    @property
    def is_in_use(self) -> bool:
        """Whether it has neither failed nor is leaving."""
        return self.state in ("starting", "stale", "ready")

    @property
    def is_up(self) -> bool:
        """Whether its process can be called and no task is changing it."""
        return self.change is None and self.is_in_use

    def next_wait_s(self, first_s: float) -> float:
        """Return the seconds to wait before its restart."""
        self.wait = self.wait or GrowingWait(first_s)
        return self.wait.next_s()

    def status(self) -> GeneratorStatus:
        """Return its state as `rlhf-ray status` shows it."""
        version = self.serves.version if self.serves is not None else None
        return GeneratorStatus(self.name, self.state, version, self.restarts)


def num_left(members: Sequence[Member[Any]]) -> int:
    """Return how many are up or may come; without capacity in the cluster none comes."""
    gone = ("dead", "retired")
    return sum(each.state not in gone and not each.lacks_capacity for each in members)


def too_few(
    members: Sequence[Member[Any]], num_needed: int, max_restarts: int, last: Exception | None
) -> ActorFailure:
    """Return the error that ends a run, with the last failure of a generator."""
    left = num_left(members)
    which = (
        f"Only {left} of the {num_needed} generators that a run begins with (generators.min_ready) "
        "are left"
        if left
        else "No generator is left"
    )
    why = (
        "the cluster has no capacity for another; run again once it has: the run resumes at its "
        "last commit"
        if any(each.lacks_capacity for each in members)
        else f"{max_restarts} restarts (generators.max_restarts) are used up"
    )
    return ActorFailure(f"{which}, and {why}. The last failure: {last}")


async def proved_again(
    proof: Proof | None, generator: Generator, why: WeightSyncError
) -> WeightSyncError:
    """Prove a generator that sampled wrong; return what was wrong, and what the proof finds."""
    assert proof is not None
    try:
        await proof(generator)
        found = "passed"
    except Exception as error:  # a failing engine raises its libraries' errors
        found = f"failed: {error}"
    return WeightSyncError(f"{why}. The proof, made again, {found}")


LATE, LATE_S = 2.0, 10.0
"""A generator is late that takes so many times as long as those that are needed, and so many
seconds more."""


class Lateness:
    """Tells when those that are not done yet are late, from the time that enough others took."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._ends: float | None = None

    def left_s(self) -> float:
        """Return the seconds until the others are late; call it once enough are done."""
        now = self._clock()
        if self._ends is None:
            self._ends = now + (LATE - 1) * (now - self._began) + LATE_S
        return self._ends - now


async def until_late(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Wait until all tasks are done, or half of them are and the others are late."""
    lateness, pending = Lateness(), {*tasks}
    while pending:
        timeout = lateness.left_s() if len(tasks) >= 2 * len(pending) else None
        if timeout is not None and timeout <= 0:
            return
        _, pending = await asyncio.wait(
            pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
        )


async def cancel(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
