"""Hands the shards of batches to the generators that are ready, and takes their answers in.

    queue --> issue --> answer: it goes to whoever asked for the batch, once
      ^         |  ^
      |         |  +--- slower than the others' by far: issued once more to one with nothing to do
      +---------+ its generator failed or left

Whoever samples a shard, its seeds and so its samples are the same: the first answer counts. Of
several batches the oldest one's shards go first, after those that one version alone may sample.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import heapify, heappop, heapreplace
from itertools import chain
from math import inf
from typing import Generic

from rlhf_ray.config.rollout import GeneratorsConfig
from rlhf_ray.errors import ActorFailure, NodeLeaves, PlacementError, WeightSyncError
from rlhf_ray.generators.member import GeneratorT, Member, cancel
from rlhf_ray.generators.queue import IdleTimes, ShardQueue
from rlhf_ray.observability.outages import Outages
from rlhf_ray.types import IdleShares, Shard, ShardRequest

LOOK_S = 1.0
"""Interval between two looks for stragglers."""
PATIENCE_S = 10.0
"""Shards that take less than this are never issued again: it would save nothing."""


@dataclass(eq=False)
class _Issue(Generic[GeneratorT]):
    """A shard at a generator."""

    member: Member[GeneratorT]
    request: ShardRequest
    began_s: float
    call: asyncio.Task[Shard]
    is_again: bool
    """Whether another generator had the shard already."""


@dataclass
class _Batch(Generic[GeneratorT]):
    """The shards of one batch: those to sample, those at generators, and the results."""

    queue: ShardQueue
    version: int
    """Adapter version to sample with."""
    or_newer: bool
    """Whether a newer one will do as well."""
    done: asyncio.Queue[Shard | BaseException] = field(default_factory=asyncio.Queue)
    """Results in order of arrival: finished shards, or an error that ends the batch."""
    by_index: dict[int, list[_Issue[GeneratorT]]] = field(default_factory=dict)
    """Index of a shard at generators -> its issues."""
    calls: set[asyncio.Task[Shard]] = field(default_factory=set)
    """The running calls, also of shards that another generator has finished."""
    took: list[tuple[str, float]] = field(default_factory=list)
    """Generator and seconds of each finished shard."""

    def may_go_to(self, member: Member[GeneratorT]) -> bool:
        """Return whether a generator serves a version that may sample this batch."""
        served = -1 if member.serves is None else member.serves.version
        return served == self.version or (self.or_newer and served > self.version)

    @property
    def issues(self) -> "Iterator[_Issue[GeneratorT]]":
        """All issues, in the order of their shards' first ones."""
        return chain.from_iterable(self.by_index.values())

    def at(self, index: int) -> "list[_Issue[GeneratorT]]":
        """Return the issues of a shard."""
        return self.by_index.get(index, [])


class Dispatch(Generic[GeneratorT]):
    """Distributes the shards of batches."""

    def __init__(
        self,
        members: Sequence[Member[GeneratorT]],
        settings: GeneratorsConfig,
        lose: Callable[[Member[GeneratorT], ActorFailure], None],
        clock: Callable[[], float] = time.monotonic,
        outages: Outages | None = None,
    ) -> None:
        """
        Args:
            members: all generators, ready or not; the pool changes the list.
            settings: limits on the shards in flight, and when to issue one again.
            lose: called with a generator that has failed.
            clock: in seconds.
            outages: counts the time in which no generator was ready after a failure.
        """
        self._outages = outages or Outages()
        self._none_since: float | None = None
        self._members = members
        self._settings = settings
        self._lose = lose
        self._clock = clock
        self._times = IdleTimes(clock)
        self._batches: list[_Batch[GeneratorT]] = []
        self._is_awaited = False
        self.requeued = self.reissued = 0
        """Number of samples requeued and issued again so far."""

    async def run(
        self, requests: Sequence[ShardRequest], *, or_newer: bool = False
    ) -> AsyncIterator[Shard]:
        """Yield each shard as it finishes.

        Args:
            requests: all of one version.
            or_newer: whether shards may also be sampled with a newer version, which they then
                name.
        """
        version = requests[0].version if requests else 0
        batch = _Batch[GeneratorT](ShardQueue(requests), version, or_newer)
        self._batches.insert(len(self._batches) if or_newer else 0, batch)
        self.hand_out()
        self._look(batch)
        try:
            for _ in requests:
                result = await batch.done.get()
                if isinstance(result, BaseException):
                    raise result
                yield result
        finally:
            # Before the calls are cancelled: their callbacks must not hand shards out again.
            self._batches.remove(batch)
            batch.by_index.clear()
            self.note()
            await cancel([*batch.calls])

    async def cancel_all(self) -> None:
        """Cancel every call."""
        await cancel([call for member in self._members for call in member.calls])

    def end(self, error: Exception) -> None:
        """End all batches with an error."""
        for batch in self._batches:
            batch.done.put_nowait(error)

    def ready(self) -> list[Member[GeneratorT]]:
        """Return the generators that get shards."""
        return [member for member in self._members if member.state == "ready"]

    def admit(self, member: Member[GeneratorT]) -> None:
        """Give shards to a generator from now on."""
        member.change_to("ready")
        if self._none_since is not None:
            self._outages.lost("generator", "none ready", self._clock() - self._none_since)
            self._none_since = None
        self.hand_out()

    def count_restart(self, error: Exception) -> None:
        """Count the restart of a generator; others may sample meanwhile, so it costs no time."""
        if not isinstance(error, PlacementError):  # then it has not started
            causes = {WeightSyncError: "wrong adapter", NodeLeaves: "moved"}
            self._outages.restarted("generator", causes.get(type(error), "failed"), 0.0)

    def hand_out(self) -> None:
        """Give waiting shards to generators with free slots, the least loaded first."""
        limit = self._settings.max_in_flight
        for batch in self._batches:
            free = self._free(batch, limit) if len(batch.queue) else []
            by_load = [(member.load, place, member) for place, member in enumerate(free)]
            heapify(by_load)
            while len(batch.queue) and by_load:
                load, place, member = by_load[0]
                self._issue(batch, member, batch.queue.take())
                if load + 1 < limit:
                    heapreplace(by_load, (load + 1, place, member))
                else:
                    heappop(by_load)
        self.note()

    def _free(self, batch: _Batch[GeneratorT], limit: float) -> list[Member[GeneratorT]]:
        return [each for each in self.ready() if each.load < limit and batch.may_go_to(each)]

    def _issue(
        self,
        batch: _Batch[GeneratorT],
        member: Member[GeneratorT],
        request: ShardRequest,
        is_again: bool = False,
    ) -> None:
        assert member.serves is not None
        request = replace(request, version=member.serves.version)
        call = asyncio.ensure_future(member.process.generate(request))
        issue = _Issue(member, request, self._clock(), call, is_again)
        batch.by_index.setdefault(request.index, []).append(issue)
        batch.calls.add(call)
        member.calls.add(call)
        call.add_done_callback(partial(self._take_in, batch, issue))

    def _take_in(
        self, batch: _Batch[GeneratorT], issue: _Issue[GeneratorT], call: asyncio.Task[Shard]
    ) -> None:
        """Pass a shard on, unless another generator has it or has answered it meanwhile."""
        member = issue.member
        member.calls.discard(call)
        batch.calls.discard(call)
        error = None if call.cancelled() else call.exception()
        if call.cancelled() or issue not in batch.at(issue.request.index):
            pass  # passing it on would count it twice
        elif isinstance(error, ActorFailure):
            if member.state == "retired":
                self.hand_back(member)
            else:
                self._lose(member, error)
        else:
            for each in batch.by_index.pop(issue.request.index):
                each.call.cancel()  # the others'; this one is done
            batch.took.append((member.name, self._clock() - issue.began_s))
            member.wait = None
            batch.done.put_nowait(error or call.result())
        self.hand_out()

    def hand_back(self, member: Member[GeneratorT]) -> None:
        """Requeue what a generator holds, unless another one has it too."""
        if self._none_since is None and not self.ready():
            self._none_since = self._clock()
        for call in member.calls:
            call.cancel()
        for batch in self._batches:
            held = [issue for issue in batch.issues if issue.member is member]
            for issue in held:
                batch.at(issue.request.index).remove(issue)
            left = [issue.request for issue in held if not batch.at(issue.request.index)]
            batch.queue.put_back(left)
            self.requeued += sum(len(request.samples) for request in left)
        self.hand_out()

    def _look(self, batch: _Batch[GeneratorT]) -> None:
        """Issue stragglers again, now and at intervals until the batch ends."""
        if batch in self._batches and self._settings.straggler_factor is not None:
            self._issue_again(batch, self._settings.straggler_factor)
            asyncio.get_running_loop().call_later(LOOK_S, self._look, batch)

    def _issue_again(self, batch: _Batch[GeneratorT], factor: float) -> None:
        """Give shards that take far longer than any of the other generators' did to idle ones.

        The longest one counts, not the usual one: responses differ in length by nature. A
        generator is idle if it has nothing of the batch but such shards; shards of later batches,
        which may fill it up, are less urgent.
        """
        is_urgent = batch is self._batches[0] and len(self._batches) > 1
        limit = inf if is_urgent else self._settings.max_in_flight
        for issue in sorted(batch.issues, key=lambda issue: issue.began_s):
            others = [seconds for name, seconds in batch.took if name != issue.member.name]
            if len(batch.queue) or not others or len(batch.at(issue.request.index)) > 1:
                continue
            if self._clock() - issue.began_s <= max(PATIENCE_S, factor * max(others)):
                continue
            own = [each.member for each in batch.issues if not each.is_again]
            idle = [member for member in self._free(batch, limit) if member not in own]
            if not idle:
                return
            self._issue(batch, min(idle, key=lambda each: each.load), issue.request, is_again=True)
            self.reissued += len(issue.request.samples)
        self.note()

    # Idle times.

    def note(self) -> None:
        """Note how many generators work and could work from now on."""
        serving = [m for m in self._members if m.state in ("stale", "ready")]
        waiting = sum(len(batch.queue) for batch in self._batches)
        # A batch of one version is never generated ahead: all else waits for it.
        is_awaited = self._is_awaited or not all(batch.or_newer for batch in self._batches)
        busy = sum(bool(member.calls) for member in serving)
        self._times.note(busy, len(serving), waiting, is_awaited)

    @contextmanager
    def awaited(self) -> Generator[None]:
        """Count the time as one in which learners wait for a batch that is generated ahead."""
        self._is_awaited = True
        self.note()
        try:
            yield
        finally:
            self._is_awaited = False
            self.note()

    def lap(self) -> IdleShares:
        """Return the idle shares since the last call."""
        return self._times.lap()
