"""Generators and their processes for tests of the pool: they answer when they are told to."""

import asyncio
from collections.abc import Sequence
from typing import Any

from rlhf_ray.cluster.role_clients import GeneratorClient
from rlhf_ray.config.rollout import AutoscaleConfig, GeneratorsConfig
from rlhf_ray.errors import ActorFailure
from rlhf_ray.generators.pool import GeneratorPool
from rlhf_ray.observability.outages import Outages
from rlhf_ray.types import (
    AdapterUpdate,
    Prompt,
    SampleRequest,
    Shard,
    ShardInfo,
    ShardRequest,
)


def requests(*prompt_lengths: int, version: int = 0, start: int = 0) -> list[ShardRequest]:
    """A shard a prompt, numbered from ``start``."""
    return [
        ShardRequest(i, (SampleRequest(i, Prompt(str(i), "", (1,) * length), 0),), version)
        for i, length in enumerate(prompt_lengths, start)
    ]


def update(version: int) -> AdapterUpdate:
    return AdapterUpdate(version, f"digest-{version}", {}, b"")


class HandMade(GeneratorClient):
    """Answers a shard when `answer` or `die` says so; serves what it was sent last."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.serves: int | None = None
        self.begun: list[int] = []
        self.ended = False
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def generate(self, request: ShardRequest) -> Shard:
        assert self.serves == request.version, f"{self.name} got a prompt of another version"
        assert not self.ended
        self.begun.append(request.index)
        future = self._waiting[request.index] = asyncio.get_running_loop().create_future()
        try:
            await future
        finally:
            del self._waiting[request.index]
        info = ShardInfo(request.index, (request.index,), (1,), (True,), (request.version,))
        return Shard(info, self.name)

    @property
    def holds(self) -> list[int]:
        """Shards that it samples."""
        return sorted(self._waiting)

    def answer(self, index: int) -> None:
        if not self._waiting[index].done():
            self._waiting[index].set_result(None)

    def die(self, error: Exception | None = None) -> None:
        """Fail every call under way."""
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error or ActorFailure(f"{self.name} died"))

    def answer_and_die(self) -> None:
        """Fail the first call under way, and answer the others in the same moment."""
        waiting = [future for future in self._waiting.values() if not future.done()]
        for future in waiting[1:]:
            future.set_result(None)
        if waiting:
            waiting[0].set_exception(ActorFailure(f"{self.name} died"))


class Processes:
    """Starts generators and remembers them; starts, proofs and publications fail as told."""

    def __init__(self) -> None:
        self.started: list[HandMade] = []
        self.ended: list[str] = []
        self.log: list[tuple[str, str]] = []
        self.room_for: list[int] = []
        self.faults: dict[tuple[str, str], list[Exception]] = {}
        """(what, generator) -> errors of the next such steps."""
        self.gates: dict[tuple[str, str], asyncio.Event] = {}
        """(what, generator) -> what such steps wait for."""

    def make(self, name: str) -> HandMade:
        self.started.append(HandMade(name))
        return self.started[-1]

    def __getitem__(self, name: str) -> HandMade:
        """The latest of that name."""
        return next(made for made in reversed(self.started) if made.name == name)

    async def start(self, name: str) -> HandMade:
        await self._step("start", name)
        return self.make(name)

    async def load(self, generator: Any) -> None:
        await self._step("start", generator.name)

    async def end(self, generator: Any) -> None:
        generator.ended = True
        self.ended.append(generator.name)

    def request_capacity(self, num: int) -> None:
        self.room_for.append(num)

    async def prove(self, generator: Any) -> None:
        await self._step("prove", generator.name)

    async def serve(self, generator: Any, sent: AdapterUpdate) -> None:
        await self._step(f"publish {sent.version}", generator.name)
        generator.serves = sent.version

    async def _step(self, what: str, name: str) -> None:
        self.log.append((what, name))
        if (what, name) in self.gates:
            await self.gates[what, name].wait()
        if self.faults.get((what, name)):
            raise self.faults[what, name].pop(0)


class Elastic:
    """A pool over hand-made generators."""

    def __init__(
        self,
        num: int,
        max_in_flight: int = 2,
        max_restarts: int = 3,
        drain_timeout_s: float = 60.0,
        autoscale: AutoscaleConfig | None = None,
        min_ready: int = 1,
        straggler_factor: float | None = 2.0,
        waits_for_shards: bool = True,
    ) -> None:
        self.now = 0.0
        """What the pool's clock shows, seconds."""
        self.processes = Processes()
        self.told: list[str] = []
        self.outages = Outages()
        settings = GeneratorsConfig(
            num=num,
            min_ready=min_ready,
            max_in_flight=max_in_flight,
            max_restarts=max_restarts,
            drain_timeout_s=drain_timeout_s,
            straggler_factor=straggler_factor,
        )
        first = [self.processes.make(f"generator-{i}") for i in range(num)]
        self.pool = GeneratorPool(
            first,
            self.processes,
            self.processes.serve,
            settings,
            autoscale,
            self.told.append,
            first_wait_s=0.0,
            clock=lambda: self.now,
            outages=self.outages,
            waits_for_shards=waits_for_shards,
        )
        self.done: list[tuple[int, str]] = []
        """(shard, who sampled it), as they came."""

    def __getitem__(self, number: int) -> HandMade:
        return self.processes[f"generator-{number}"]

    async def begin(self, *prompt_lengths: int) -> asyncio.Future[None]:
        """Prove, publish version 0, and ask for a shard a prompt; returns what ends with them."""
        await self.pool.prove(self.processes.prove)
        await self.pool.publish(update(0))
        return await self.ask(requests(*prompt_lengths))

    async def ask(
        self, shards: Sequence[ShardRequest], *, or_newer: bool = False
    ) -> asyncio.Future[None]:
        batch = asyncio.ensure_future(self._collect(shards, or_newer))
        await settle()
        return batch

    async def _collect(self, shards: Sequence[ShardRequest], or_newer: bool) -> None:
        async for shard in self.pool.generate(shards, or_newer=or_newer):
            self.done.append((shard.info.index, shard.rollouts))

    async def answer_all(self) -> None:
        """Everyone answers until nobody is asked anything."""
        for _ in range(100):
            held = [(made, index) for made in self.processes.started for index in made.holds]
            for made, index in held:
                made.answer(index)
            await settle()

    def states(self) -> dict[str, str]:
        return {status.name: status.state for status in self.pool.statuses()}


async def settle() -> None:
    """Let everything happen that waits for nobody."""
    for _ in range(12):
        await asyncio.sleep(0)
