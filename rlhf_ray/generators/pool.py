"""The pool of generators: they join, serve, fail, restart and leave while the run continues.

    start --> prove --> publish --> READY --> shards (`dispatch`)
      ^                    ^          |
      |                    +----------+   each new version
      +--- end its process <----------+   a failure: its prompts are queued again

At the start of a run, later, and after a failure a generator reaches its first prompt by the same
path: its process starts, passes the proof, and serves the latest published adapter
(`publications`). Nothing here imports Ray.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic

from rlhf_ray.config.rollout import AutoscaleConfig, GeneratorsConfig
from rlhf_ray.errors import (
    ActorFailure,
    ConfigError,
    LostNodes,
    NodeLeaves,
    PlacementError,
    WeightSyncError,
)
from rlhf_ray.generators.autoscale import next_target
from rlhf_ray.generators.dispatch import Dispatch
from rlhf_ray.generators.first_starts import FirstStarts
from rlhf_ray.generators.member import (
    Factory,
    GeneratorT,
    Member,
    Serve,
    cancel,
    num_left,
    proved_again,
    too_few,
)
from rlhf_ray.generators.publications import Publications
from rlhf_ray.generators.queue import NOTHING_YET
from rlhf_ray.observability.outages import Outages
from rlhf_ray.roles import Proof
from rlhf_ray.types import (
    AdapterUpdate,
    GeneratorsReport,
    GeneratorState,
    GeneratorStatus,
    IdleShares,
    Shard,
    ShardRequest,
)


class GeneratorPool(Generic[GeneratorT]):
    """The generators of a run, in processes that a factory starts and ends."""

    def __init__(
        self,
        first: Sequence[GeneratorT],
        factory: Factory[GeneratorT],
        serve: Serve,
        settings: GeneratorsConfig,
        autoscale: AutoscaleConfig | None = None,
        say: Callable[[str], None] = lambda _: None,
        first_wait_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        outages: Outages | None = None,
        waits_for_shards: bool = True,
    ) -> None:
        """
        Args:
            first: generators that the run begins with; `start` starts them.
            factory: starts and ends those that join later.
            serve: publishes to one generator.
            settings: limits on work, restarts and draining.
            autoscale: settings of autoscaling; None: the number only changes on request.
            say: prints a line for each change.
            first_wait_s: wait before a generator's first restart.
            clock: in seconds.
            outages: counts restarts, and the time in which no generator was ready.
            waits_for_shards: whether a generator has to finish its shards before it can take
                another adapter.
        """
        self._members = [Member(client.name, client) for client in first]
        self._num_named = len(first)
        self._factory = factory
        self._settings = settings
        self._autoscale = autoscale
        self._say = say
        self._first_wait_s = first_wait_s
        self._target = len(first)
        self._dispatch = Dispatch(self._members, settings, self._lose, clock, outages)
        self._publications = Publications(
            self._members, serve, self._dispatch.admit, self._lose, say, waits_for_shards
        )
        self._restarts = 0
        self._lost_nodes = LostNodes()
        self._last_failure: Exception | None = None
        self._beside: asyncio.Future[None] | None = None
        """The publication that goes on beside the run, or its outcome."""
        self._idle = NOTHING_YET
        self._seen: list[IdleShares] = []

    async def start(self) -> None:
        """Start the first generators, and wait until as many as a run needs are up.

        Those that fail are started again, and those that are late join later.

        Raises:
            Exception: that of all first starts, where they fail alike: restarts would not help.
            ActorFailure: too few are left.
        """
        starts = {member: asyncio.ensure_future(self._come_up(member)) for member in self._members}
        for member, start in starts.items():
            member.change = start
        num_needed = self._settings.min_ready
        first = FirstStarts(starts, self._lose, self._say)
        await first.wait(num_needed, lambda: self._require_left(num_needed))

    async def prove(self, proof: Proof) -> None:
        """Prove every generator; those that fail are restarted."""
        await self._publications.prove(proof)

    async def publish(self, update: AdapterUpdate, *, beside: bool = False) -> None:
        """Publish an adapter to every running generator, between its shards.

        Args:
            update: the adapter.
            beside: return at once. Where no generator can serve it, all batches end with the error.
        """
        if self._beside is not None:
            publication, self._beside = self._beside, None
            await publication
        if beside:
            self._beside = asyncio.ensure_future(self._publish_beside(update))
        else:
            await self._publish(update, is_ahead=False)

    async def _publish(self, update: AdapterUpdate, *, is_ahead: bool) -> None:
        await self._publications.publish(update)
        self._require_left(1)
        self._idle = self._dispatch.lap()
        if self._autoscale is not None:
            self._follow_load(self._autoscale, is_ahead)

    async def _publish_beside(self, update: AdapterUpdate) -> None:
        try:
            await self._publish(update, is_ahead=True)
        except Exception as error:  # a failing engine raises its libraries' errors
            self._dispatch.end(error)
            raise

    def awaited(self) -> AbstractContextManager[None]:
        """Count the time as one in which learners wait for a batch that is generated ahead."""
        return self._dispatch.awaited()

    async def generate(
        self, requests: Sequence[ShardRequest], *, or_newer: bool = False
    ) -> AsyncIterator[Shard]:
        """Yield each shard as it finishes; the order of generation only changes the time.

        Raises:
            WeightSyncError: no generator serves the adapter that was published beside.
        """
        self._require_left(1)
        failed = self._beside.exception() if self._beside and self._beside.done() else None
        if failed is not None:  # it has ended the batches that were under way, and not this one
            raise failed
        async for shard in self._dispatch.run(requests, or_newer=or_newer):
            yield shard

    def replace(self, names: Collection[str], why: WeightSyncError) -> None:
        """Replace generators that sampled wrong; before, prove them once more, for the record."""
        suspects = [member for member in self._dispatch.ready() if member.name in names]
        is_spent = self._restarts >= self._settings.max_restarts
        if is_spent and len(suspects) == num_left(self._members):
            raise why
        for member in suspects:
            self._change(member, "stale", self._prove_again(member, why))
            self._dispatch.hand_back(member)

    def scale_to(self, num: int) -> None:
        """Start or retire generators in the background until there are ``num``.

        Raises:
            ConfigError: ``num`` is below 1.
        """
        if num < 1:
            raise ConfigError(f"A run needs at least one generator; {num} were requested")
        self._members[:] = [m for m in self._members if m.state != "dead"]
        current = [m for m in self._members if m.state != "retired"]
        if num == self._target == len(current):
            return
        self._say(f"generators: {num} requested, {len(current)} running")
        self._target, self._seen = num, []
        self._factory.request_capacity(num)
        for _ in range(num - len(current)):
            self._add()
        # Among members that are equally cheap to retire the newest leaves: sorting is stable.
        newest_first = current[::-1]
        cheapest_first = sorted(newest_first, key=lambda m: (m.state == "ready", m.load))
        for member in cheapest_first[: max(0, len(current) - num)]:
            self._change(member, "retired", self._leave(member))

    def statuses(self) -> list[GeneratorStatus]:
        """Return the state of each generator that has not left."""
        return [member.status() for member in self._members]

    def report(self) -> GeneratorsReport:
        """Return the state of all generators together."""
        return GeneratorsReport(
            ready=len(self._dispatch.ready()),
            target=self._target,
            restarts=self._restarts,
            samples_requeued=self._dispatch.requeued,
            samples_reissued=self._dispatch.reissued,
            idle=self._idle,
        )

    async def close(self) -> None:
        """Cancel all changes and calls; the caller ends the processes."""
        changes = [member.change for member in self._members]
        await cancel([each for each in (*changes, self._beside) if each is not None])
        await self._dispatch.cancel_all()

    # How a generator becomes ready.

    def _add(self) -> None:
        member = Member(f"generator-{self._num_named}")
        self._num_named += 1
        self._members.append(member)
        member.change = asyncio.ensure_future(self._bring_up(member))

    async def _bring_up(self, member: Member[GeneratorT]) -> None:
        try:
            await self._come_up(member)
        except Exception as error:  # a failing engine raises its libraries' errors
            self._lose(member, error)

    async def _come_up(self, member: Member[GeneratorT]) -> None:
        """Start, prove, and publish until no newer version was published meanwhile."""
        if member.client is None:
            member.client = await self._factory.start(member.name)
        else:
            await self._factory.load(member.client)
        member.lacks_capacity = False
        member.change_to("stale")
        await self._publications.qualify(member)
        member.change = None
        # Without a first publication there is nothing to serve: `publish` admits it then.
        if self._publications.latest is not None:
            self._dispatch.admit(member)
            num_ready = len(self._dispatch.ready())
            self._say(f"{member.name} is up: {num_ready} of {self._target} generators")

    # How a generator fails or leaves.

    def _lose(self, member: Member[GeneratorT], error: Exception) -> None:
        """Requeue its prompts, end its process, restart it."""
        self._last_failure = error
        self._say(f"{member.name} is out of use: {error}")
        member.serves = None
        # State before queue: handing back gives the shards to ready generators, and this one must
        # not be among them.
        self._change(member, "suspect", self._replace(member, error))
        self._dispatch.hand_back(member)

    async def _prove_again(self, member: Member[GeneratorT], why: WeightSyncError) -> None:
        self._lose(member, await proved_again(self._publications.proof, member.process, why))

    async def _replace(self, member: Member[GeneratorT], error: Exception) -> None:
        await self._end(member)
        member.change_to("dead")
        member.lacks_capacity = isinstance(error, PlacementError)
        is_free = isinstance(error, PlacementError | NodeLeaves) or self._lost_nodes.has(error)
        is_fault = not is_free
        if is_fault and self._restarts >= self._settings.max_restarts:
            member.change = None
            self._end_without_any()
            return
        self._restarts += is_fault  # the others cost no restart
        self._lost_nodes.add(error)
        member.restarts += is_fault
        self._dispatch.count_restart(error)
        member.change_to("restarting")
        self._end_without_any()
        await asyncio.sleep(member.next_wait_s(self._first_wait_s))
        member.change_to("starting")
        await self._bring_up(member)

    async def _leave(self, member: Member[GeneratorT]) -> None:
        """Finish its shards, or requeue them after drain_timeout_s; then end its process."""
        if member.calls:
            await asyncio.wait(member.calls, timeout=self._settings.drain_timeout_s)
        self._dispatch.hand_back(member)
        await self._end(member)
        self._members.remove(member)
        self._say(f"{member.name} has left")

    async def _end(self, member: Member[GeneratorT]) -> None:
        if member.client is not None:
            await self._factory.end(member.client)
            member.client = None

    def _change(
        self, member: Member[GeneratorT], state: GeneratorState, what: Coroutine[Any, Any, None]
    ) -> None:
        """Go to a state and run its task instead of the current one."""
        # A task that changes its own member (a failed restart) must not cancel itself.
        if member.change is not None and member.change is not asyncio.current_task():
            member.change.cancel()
        member.change_to(state)
        member.change = asyncio.ensure_future(what)

    def _end_without_any(self) -> None:
        if not num_left(self._members):
            self._dispatch.end(self._too_few(1))

    def _require_left(self, num: int) -> None:
        if num_left(self._members) < num:
            raise self._too_few(num) from self._last_failure

    def _too_few(self, num_needed: int) -> ActorFailure:
        return too_few(self._members, num_needed, self._settings.max_restarts, self._last_failure)

    def _follow_load(self, settings: AutoscaleConfig, is_ahead: bool) -> None:
        """Scale by the idle times since the last batch, once all placed generators are ready."""
        ready, unplaced = len(self._dispatch.ready()), sum(m.lacks_capacity for m in self._members)
        if (is_ahead or self._idle.learners) and ready + unplaced == self._target:
            self._seen.append(self._idle)
            target = next_target(settings, ready, self._seen, unplaced, is_ahead=is_ahead)
            self.scale_to(target)
