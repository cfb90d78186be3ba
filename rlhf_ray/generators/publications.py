"""The proof that every generator passes, and the adapter that each of them serves."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic

from rlhf_ray.errors import ActorFailure, WeightSyncError
from rlhf_ray.generators.member import GeneratorT, Member, Serve, cancel, until_late
from rlhf_ray.roles import Proof
from rlhf_ray.types import AdapterUpdate


class Publications(Generic[GeneratorT]):
    """Proves generators, and publishes to them: to all at once, and to each one that joins."""

    def __init__(
        self,
        members: Sequence[Member[GeneratorT]],
        serve: Serve,
        admit: Callable[[Member[GeneratorT]], None],
        lose: Callable[[Member[GeneratorT], Exception], None],
        say: Callable[[str], None],
        waits_for_shards: bool,
    ) -> None:
        """
        Args:
            members: all generators; the pool changes the list.
            serve: publishes to one generator.
            admit: called with a generator that serves the latest adapter.
            lose: called with a generator that has failed.
            say: prints a line.
            waits_for_shards: whether shards at a generator are finished before it is sent an
                adapter: with other weights a shard would have samples of two versions.
        """
        self._members = members
        self._serve = serve
        self._admit = admit
        self._lose = lose
        self._say = say
        self._waits_for_shards = waits_for_shards
        self.proof: Proof | None = None
        self.latest: AdapterUpdate | None = None
        """The adapter that was published last."""

    async def prove(self, proof: Proof) -> None:
        """Prove every generator; those that fail are lost."""
        self.proof = proof
        await self._each(self._prove)

    async def publish(self, update: AdapterUpdate) -> None:
        """Publish an adapter to every running generator, between its shards."""
        # First of all: a generator that is just starting reads it when it is proved, and one that
        # has sent an older adapter meanwhile sends this one too before it becomes ready.
        self.latest = update
        await self._each(self._catch_up)

    async def qualify(self, member: Member[GeneratorT]) -> None:
        """Prove one generator, and publish to it until no newer version was published meanwhile."""
        if self.proof is not None:
            await self.proof(member.process)
        while member.serves is not self.latest:
            await self._send(member)

    async def _each(self, step: Callable[[Member[GeneratorT]], Coroutine[Any, Any, None]]) -> None:
        """Take a step with every running generator; restart those that fail, unless all do.

        One that is late is not waited for: it joins when it is done.
        """
        members = [member for member in self._members if member.is_up]
        steps = [asyncio.ensure_future(step(member)) for member in members]
        try:
            await until_late(steps)
        except BaseException:
            await cancel(steps)
            raise
        failed: list[tuple[Member[GeneratorT], ActorFailure | WeightSyncError]] = []
        for member, taken in zip(members, steps, strict=True):
            if not taken.done():
                self._say(f"{member.name} is late; the run continues without it until it is done")
                member.change = asyncio.ensure_future(self._join_late(member, taken))
            elif isinstance(outcome := taken.exception(), ActorFailure | WeightSyncError):
                failed.append((member, outcome))
            elif outcome is not None:
                raise outcome
        # Where all fail, and any by its weights, the set-up is at fault: restarts do not help.
        sync_errors = [error for _, error in failed if isinstance(error, WeightSyncError)]
        if sync_errors and len(failed) == len(members):
            raise sync_errors[0]
        for member, error in failed:
            if member.is_up:  # not retired meanwhile
                self._lose(member, error)

    async def _join_late(self, member: Member[GeneratorT], step: "asyncio.Future[None]") -> None:
        try:
            await step
            if self.latest is not None:
                await self._catch_up(member)
        except Exception as error:
            self._lose(member, error)
            return
        member.change = None

    async def _prove(self, member: Member[GeneratorT]) -> None:
        assert self.proof is not None
        await self.proof(member.process)
        if member.state == "starting":
            member.change_to("stale")

    async def _catch_up(self, member: Member[GeneratorT]) -> None:
        while member.is_in_use and member.serves is not self.latest:
            if member.state != "stale":
                member.change_to("stale")
            if member.calls and self._waits_for_shards:
                await asyncio.wait(member.calls)
            else:
                await asyncio.sleep(0)  # shards that were issued just now reach it before this
                await self._send(member)
        if member.state == "stale":  # not lost or retired meanwhile
            self._admit(member)

    async def _send(self, member: Member[GeneratorT]) -> None:
        update = self.latest
        assert update is not None
        await self._serve(member.process, update)
        member.serves = update
