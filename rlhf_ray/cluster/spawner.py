"""Starts the workers of roles where the config says, and ends them."""

import asyncio
import inspect
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from rlhf_ray.cluster.colocation import SIDES, Turns, TurnWorker
from rlhf_ray.cluster.ray_workers import RayWorker, ask_for_room, fetch, kill, spawn
from rlhf_ray.cluster.role_clients import InlineWorker, OnCall, Worker
from rlhf_ray.config import Config
from rlhf_ray.placement.groups import Placement
from rlhf_ray.placement.layout import Demand

ASYNC_CONCURRENCY = 32
"""Calls that a role whose methods are async works on at a time."""

ASK_AGAIN_S = 30.0
"""Between two requests for the same nodes, while there is no room."""
END_TIMEOUT_S = 20.0
"""For a worker that is ended to free what it holds."""


class RoleSpawner:
    """Starts role classes where the config says, and ends them."""

    def __init__(self, config: Config, on_call: OnCall) -> None:
        self._config = config
        self._on_call = on_call
        self._on_ray = config.cluster.runs_on_ray
        self._joins = config.cluster.joins_cluster
        self._placement = Placement(
            config.placement.timeout_s, may_grow=self._joins, request_nodes=self._ask_again
        )
        self._turns = Turns() if config.placement.turns else None
        self.workers: list[Worker] = []
        self._asked: Sequence[Demand] = []
        self._request: tuple[Any, ...] | None = None
        self._requested_at = 0.0

    @property
    def learner_engine(self) -> str:
        """DeepSpeed where ranks are processes; plain PyTorch in this one."""
        return "deepspeed" if self._on_ray else "torch"

    async def place(self, asked: Sequence[Demand]) -> None:
        """Hold a place for each worker that is to be spawned; Ray's autoscaler is told of them.

        Raises:
            PlacementError: what was asked, what the cluster has, and what would fit.
        """
        self._asked = asked
        if not self._on_ray:
            return
        self._ask_for_room()
        try:
            await self._placement.reserve(asked)
        except BaseException:
            self._give_room_back()
            raise

    async def place_one(self, demand: Demand, rank: int) -> None:
        """Hold a place for a worker that is spawned later, or again.

        Raises:
            PlacementError: as `place` does.
        """
        if self._on_ray:
            await self._placement.reserve_one(demand, rank)

    def make_room(self, num_generators: int) -> None:
        """Have Ray's autoscaler keep room for so many besides all others."""
        self._asked = [
            replace(demand, workers=num_generators) if demand.role == "generator" else demand
            for demand in self._asked
        ]
        self._ask_for_room()

    def _ask_for_room(self) -> None:
        """Only a cluster that was joined may have an autoscaler."""
        if self._joins:
            request = self._wanted()
            ask_for_room(*request)
            self._request, self._requested_at = request, time.monotonic()

    def _wanted(self) -> tuple[Any, ...]:
        return self._placement.resources(self._asked), self._placement.labels(self._asked)

    def _ask_again(self) -> None:
        """While there is no room: as soon as labels of new nodes are known, and now and then, as
        another run's request may have taken the place of ours."""
        is_old = time.monotonic() - self._requested_at > ASK_AGAIN_S
        if self._joins and (is_old or self._request != self._wanted()):
            self._ask_for_room()

    def _give_room_back(self) -> None:
        self._asked = []
        with suppress(Exception):  # a cluster that does not answer keeps nobody from ending
            self._ask_for_room()

    def spawn(self, role_class: type, role: str, count: int, *args: Any) -> list[Worker]:
        """Workers ``role-0`` to ``role-<count - 1>``, not started, each in its place."""
        return [self.spawn_one(role_class, f"{role}-{i}", *args) for i in range(count)]

    def spawn_one(self, role_class: type, name: str, *args: Any) -> Worker:
        """One worker, not started."""
        worker = self._made(role_class, name, *args)
        self.workers.append(worker)
        return self._in_turn(worker)

    def _in_turn(self, worker: Worker) -> Worker:
        """How others are to call it."""
        side = SIDES.get(worker.name.rpartition("-")[0])
        return TurnWorker(worker, self._turns, side) if self._turns and side else worker

    def _made(self, role_class: type, name: str, *args: Any) -> Worker:
        if not self._on_ray:
            return InlineWorker(name, role_class(name, *args), self._on_call)
        slot = self._placement.slot(name)
        return spawn(
            role_class,
            name,
            *args,
            # On a machine that is the run's alone roles share the cores, however many come later.
            num_cpus=1 if slot or self._joins else 0,
            num_gpus=slot.num_gpus if slot else 0,
            strategy=slot.strategy if slot else None,
            concurrency=ASYNC_CONCURRENCY if _is_async(role_class) else 1,
            start_timeout_s=self._config.cluster.start_timeout_s,
            timeout_s=self._config.cluster.call_timeout_s,
            on_call=self._on_call,
        )

    async def start_all(self, groups: Sequence[Sequence[Worker]]) -> None:
        """Start every worker at once; those of a learner group meet at their first rank.

        Raises:
            ActorFailure: one was not ready in time.
        """
        in_groups = {worker.name for group in groups for worker in group}
        alone = [self._in_turn(w) for w in self.workers if w.name not in in_groups]
        await asyncio.gather(
            *(worker.call("start") for worker in alone), *map(_start_group, groups)
        )

    async def end_one(self, worker: Worker) -> None:
        """Let a worker free what it holds, if it still answers, then end its actor."""
        with suppress(Exception):  # whatever is wrong with it: it goes
            await asyncio.wait_for(worker.call("stop"), END_TIMEOUT_S)
        for ended in [w for w in self.workers if w.name == worker.name]:
            if isinstance(ended, RayWorker):
                kill([ended])
            self.workers.remove(ended)
            self._placement.release(ended.name)

    async def stop_all(self) -> None:
        """Let generators end their engines, then end every actor.

        Ray's autoscaler is told first: it would keep nodes for a run that is killed meanwhile.
        """
        self._give_room_back()
        generators = [w for w in self.workers if w.name.startswith("generator")]
        # One that is loading its base answers only when it has.
        stops = (asyncio.wait_for(w.call("stop"), END_TIMEOUT_S) for w in generators)
        await asyncio.gather(*stops, return_exceptions=True)
        kill([worker for worker in self.workers if isinstance(worker, RayWorker)])
        self._placement.close()

    def num_gpus(self) -> float:
        """GPUs that its actors hold."""
        return sum(worker.num_gpus for worker in self.workers if isinstance(worker, RayWorker))

    async def peak_memory(self) -> dict[str, int]:
        """Bytes by worker; nothing of those in this process, or that do not answer soon."""
        workers = [worker for worker in self.workers if isinstance(worker, RayWorker)]
        asked = (asyncio.wait_for(w.peak_memory(), END_TIMEOUT_S) for w in workers)
        peaks = await asyncio.gather(*asked, return_exceptions=True)
        told = zip(workers, peaks, strict=True)
        return {worker.name: peak for worker, peak in told if isinstance(peak, int)}

    async def fetch(self, handle: Any) -> Any:
        """Bring data to the driver."""
        return await fetch(handle) if self._on_ray else handle


async def _start_group(ranks: Sequence[Worker]) -> None:
    address, port = await ranks[0].address(), await ranks[0].call("free_port")
    await asyncio.gather(
        *(
            worker.call("start", rank, len(ranks), address, port)
            for rank, worker in enumerate(ranks)
        )
    )


def _is_async(role_class: type) -> bool:
    """Whether a role works on several calls at a time."""
    return any(map(inspect.iscoroutinefunction, vars(role_class).values()))
