"""Starts the processes of the roles where the config places them, and ends them."""

import asyncio
import inspect
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar, cast

import ray

from rlhf_ray.cluster.colocation import COLOCATED_GROUPS, ColocatedWorker, Colocation
from rlhf_ray.cluster.learner_groups import LearnerGroupClient
from rlhf_ray.cluster.life_signs import Watch
from rlhf_ray.cluster.nodes import request_capacity
from rlhf_ray.cluster.ray_workers import RayWorker, kill, spawn
from rlhf_ray.cluster.role_clients import Crew, Restarts, WorkerT
from rlhf_ray.cluster.workers import InlineWorker, OnCall, Worker
from rlhf_ray.config import Config
from rlhf_ray.errors import RlhfError
from rlhf_ray.observability.outages import Outages
from rlhf_ray.placement.bundles import role_of
from rlhf_ray.placement.groups import Placement
from rlhf_ray.placement.idle_actors import IDLE, needs_no_slots
from rlhf_ray.placement.layout import Demand
from rlhf_ray.roles import GeneratorProcess, Process, Sleeper

RoleT = TypeVar("RoleT", bound=Process)
Capacity = tuple[Sequence[Mapping[str, float]], Sequence[Mapping[str, str]]]
"""Resources and node labels of each bundle that is requested from Ray's autoscaler."""

ASYNC_CONCURRENCY = 32
"""Concurrent calls of a role whose methods are async."""
REQUEST_INTERVAL_S = 30.0
"""Interval between two requests for the same nodes, while the cluster lacks capacity."""
FREE_WITHIN_S = 1.0
"""A placement that takes longer has waited for others to leave, or for nodes."""
END_TIMEOUT_S = 20.0
"""Time for a worker to free its resources before its actor is killed."""


class RoleSpawner:
    """Starts role classes where the config places them, and ends them."""

    def __init__(
        self,
        config: Config,
        on_call: OnCall,
        outages: Outages | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Args:
            config: the run's.
            on_call: told of each call.
            outages: counts restarts.
            say: tells the user of restarts.
        """
        self.outages = outages or Outages()
        self._config = config
        self._on_call = on_call
        self._on_ray = config.cluster.runs_on_ray
        self.joins_cluster = config.cluster.joins_cluster
        self._placement = Placement(
            config.placement.timeout_s,
            may_grow=self.joins_cluster,
            request_nodes=self._repeat_request,
        )
        self._colocation = Colocation() if config.placement.turns else None
        self._watch = Watch()
        self.workers: list[Worker[Process]] = []
        self._spawned: dict[str, tuple[type[Process], tuple[object, ...]]] = {}
        """Worker -> its class and arguments, to spawn it again."""
        self._crews: list[Crew[Any]] = []
        self._is_ended = False
        cluster = config.cluster
        self.group_restarts = self._restarts(
            cluster.max_group_restarts, "cluster.max_group_restarts", say
        )
        self._role_restarts = self._restarts(
            cluster.max_role_restarts, "cluster.max_role_restarts", say
        )
        self._demands: Sequence[Demand] = []
        self._request: Capacity | None = None
        self._requested_at = 0.0

    def _restarts(self, limit: int, key: str, say: Callable[[str], None]) -> Restarts | None:
        """Return a budget of restarts; None where there are no processes to lose."""
        return Restarts(limit, key, self._renew, say, self.outages) if self._on_ray else None

    @property
    def learner_engine(self) -> str:
        """DeepSpeed where ranks are processes; plain PyTorch where they run in this one."""
        return "deepspeed" if self._on_ray else "torch"

    async def place(self, demands: Sequence[Demand]) -> None:
        """Reserve a slot for each worker that will be spawned; request them of the autoscaler.

        Raises:
            PlacementError: names the demand, the cluster's resources, and what would fit.
        """
        self._demands = demands
        if not self._on_ray:
            return
        self._request_capacity()
        began_s = time.monotonic()
        try:
            await self._placement.reserve(demands)
        except BaseException:
            self._release_capacity()
            raise
        if (waited_s := time.monotonic() - began_s) > FREE_WITHIN_S:
            self.outages.lost("driver", "placement", waited_s)

    async def await_capacity(self, demands: Sequence[Demand]) -> None:
        """Wait until the cluster has GPUs for all workers, whoever uses them; reserve nothing.

        Raises:
            PlacementError: it does not get them in time.
        """
        self._demands = demands
        try:
            await self._placement.await_capacity(demands)
        finally:
            if self._request is not None:
                self._release_capacity()

    async def place_one(self, demand: Demand, rank: int) -> None:
        """Reserve a slot for a worker that is spawned later, or again."""
        if self._on_ray:
            await self._placement.reserve_again(demand, [rank])

    def request_generators(self, num_generators: int) -> None:
        """Have Ray's autoscaler keep capacity for ``num_generators`` besides all other roles."""
        self._demands = [
            replace(demand, workers=num_generators) if demand.role == "generator" else demand
            for demand in self._demands
        ]
        self._request_capacity()

    def _request_capacity(self) -> None:
        if self.joins_cluster:  # only a cluster that was joined may have an autoscaler
            request = self._capacity()
            request_capacity(*request)
            self._request, self._requested_at = request, time.monotonic()

    def _capacity(self) -> Capacity:
        return self._placement.resources(self._demands), self._placement.labels(self._demands)

    def _repeat_request(self) -> None:
        """Repeat the request while the cluster lacks capacity.

        At once when labels of new nodes are known, and at intervals, because another run's request
        may have replaced ours.
        """
        is_old = time.monotonic() - self._requested_at > REQUEST_INTERVAL_S
        if self.joins_cluster and (is_old or self._request != self._capacity()):
            self._request_capacity()

    def _release_capacity(self) -> None:
        self._demands = []
        with suppress(Exception):  # a cluster that does not answer must not keep a run from ending
            self._request_capacity()

    def spawn(
        self, role_class: type[RoleT], role: str, count: int, *args: object
    ) -> list[Worker[RoleT]]:
        """Spawn workers ``role-0`` to ``role-<count - 1>`` in their slots, not started."""
        return [self.spawn_one(role_class, f"{role}-{i}", *args) for i in range(count)]

    def spawn_crew(
        self, role_class: type[RoleT], role: str, count: int, *args: object
    ) -> Crew[RoleT]:
        """Spawn the workers of a stateless role, not started; those that fail are replaced."""
        crew = Crew(self.spawn(role_class, role, count, *args), self._role_restarts)
        self._crews.append(crew)
        return crew

    def spawn_one(self, role_class: type[RoleT], name: str, *args: object) -> Worker[RoleT]:
        """Spawn a worker, not started."""
        worker = self._make(role_class, name, *args)
        self.workers.append(worker)
        self._spawned[name] = role_class, args
        return self._colocated(worker)

    async def _renew(self, workers: Sequence[WorkerT]) -> list[WorkerT]:
        """End workers of a role, dead or alive, and spawn others in their places, not started."""
        names = [worker.name for worker in workers]
        self._kill(names)
        role = role_of(names[0])
        demand = next((demand for demand in self._demands if demand.role == role), None)
        if demand is not None:
            ranks = [int(name.rpartition("-")[2]) for name in names]
            await self._placement.reserve_again(demand, ranks)
        if self._is_ended:  # what restores a group need not know that another one has failed
            raise RlhfError("The run has ended: nothing is started any more")
        spawned = [(name, *self._spawned[name]) for name in names]
        renewed = [self.spawn_one(role_class, name, *args) for name, role_class, args in spawned]
        return cast("list[WorkerT]", renewed)

    def _kill(self, names: Sequence[str]) -> None:
        ended = [worker for worker in self.workers if worker.name in names]
        kill([worker for worker in ended if isinstance(worker, RayWorker)])
        for worker in ended:
            self.workers.remove(worker)
            self._placement.release(worker.name)
            colocated = self._colocated(worker)
            if isinstance(colocated, ColocatedWorker):
                colocated.leave()

    def _colocated(self, worker: Worker[RoleT]) -> Worker[RoleT]:
        """Return the worker as others must call it: where groups share GPUs, while it is awake."""
        group = COLOCATED_GROUPS.get(role_of(worker.name))
        if self._colocation is None or group is None:
            return worker
        sleeper = cast("Worker[Sleeper]", worker)  # the roles of colocated groups can sleep
        return cast("Worker[RoleT]", ColocatedWorker(sleeper, self._colocation, group))

    def _make(self, role_class: type[RoleT], name: str, *args: object) -> Worker[RoleT]:
        if not self._on_ray:
            make = cast("Callable[..., RoleT]", role_class)
            timeout_s = self._config.cluster.call_timeout_s
            return InlineWorker(name, make(name, *args), self._on_call, timeout_s)
        slot = self._placement.slot(name)
        num_gpus = slot.num_gpus if slot else 0
        role = role_of(name)
        environment = self._config.cluster.environment_of(role, on_gpu=num_gpus > 0)
        if role == "generator" and num_gpus and self._config.rollout.batch_invariant:
            environment["VLLM_BATCH_INVARIANT"] = "1"
        return spawn(
            role_class,
            name,
            *args,
            # A machine of the run's own has too few cores for one per role, and generators may be
            # added: there roles share them. A cluster that others use must count each of ours.
            num_cpus=1 if slot or self.joins_cluster else 0,
            num_gpus=num_gpus,
            strategy=slot.strategy if slot else None,
            node_id=slot.node_id if slot else None,
            concurrency=ASYNC_CONCURRENCY if _is_async(role_class) else 1,
            environment=environment,
            start_timeout_s=self._config.cluster.start_timeout_s,
            timeout_s=self._config.cluster.call_timeout_s,
            on_call=self._on_call,
            watch=self._watch,
            actor=None if slot else _idle(name, role_class, args),
        )

    def leave(self, names: Collection[str]) -> None:
        """Leave workers to the next stage that makes them alike; generators load their base."""
        for worker in [*self.workers] if needs_no_slots(self._config) else ():
            if worker.name in names and isinstance(worker, RayWorker):
                loading = worker.actor.start.remote() if _is_generator(worker) else None
                IDLE.add(worker.name, self._spawned[worker.name], worker.actor, loading)
                self.workers.remove(worker)

    async def start_all(self, groups: Sequence[LearnerGroupClient[Any]]) -> None:
        """Start every crew and learner group at once.

        Generators are left out: their pool starts them, and again where they fail.
        """
        await asyncio.gather(*(team.start() for team in (*self._crews, *groups)))

    async def end_one(self, worker: Worker[GeneratorProcess]) -> None:
        """Let a worker free its resources, if it still answers, then kill its actor."""
        with suppress(Exception):  # a broken worker cannot stop itself; its actor is killed anyway
            await asyncio.wait_for(worker.call(GeneratorProcess.stop), END_TIMEOUT_S)
        self._kill([worker.name])

    async def stop_all(self) -> None:
        """Let generators end their engines, then kill every actor."""
        # First, because the autoscaler would keep nodes for a run that is killed while it ends.
        self._release_capacity()
        self._is_ended = True
        for crew in self._crews:
            await crew.close()
        generators = [
            cast("Worker[GeneratorProcess]", worker)
            for worker in self.workers
            if _is_generator(worker)
        ]
        # vLLM's own processes outlive a killed actor and would keep their GPUs. The timeout is for
        # a generator that is loading its base: it answers only once that is done.
        stops = (asyncio.wait_for(w.call(GeneratorProcess.stop), END_TIMEOUT_S) for w in generators)
        await asyncio.gather(*stops, return_exceptions=True)
        kill([worker for worker in self.workers if isinstance(worker, RayWorker)])
        self._placement.close()

    def num_gpus(self) -> float:
        """Return the GPUs that its actors hold."""
        return sum(worker.num_gpus for worker in self.workers if isinstance(worker, RayWorker))

    async def peak_memory(self) -> dict[str, int]:
        """Return peak bytes by worker, without those in this process or that do not answer soon."""
        workers = [worker for worker in self.workers if isinstance(worker, RayWorker)]
        calls = (asyncio.wait_for(w.peak_memory(), END_TIMEOUT_S) for w in workers)
        peaks = await asyncio.gather(*calls, return_exceptions=True)
        return {
            worker.name: peak
            for worker, peak in zip(workers, peaks, strict=True)
            if isinstance(peak, int)
        }


def _idle(name: str, role_class: type[Process], args: tuple[object, ...]) -> Any:
    """Return the idle actor of this name that was made alike; end one that was not."""
    actor, is_alike = IDLE.take(name, (role_class, args))
    if actor is None or is_alike:
        return actor
    with suppress(Exception):  # it has no method `stop`, or does not answer
        ray.get(actor.stop.remote(), timeout=END_TIMEOUT_S)
    ray.kill(actor)
    return None


def _is_generator(worker: Worker[Process]) -> bool:
    """Return whether it is a generator, by its name."""
    return worker.name.startswith("generator-")


def _is_async(role_class: type) -> bool:
    """Return whether a role works on several calls at a time."""
    return any(map(inspect.iscoroutinefunction, vars(role_class).values()))
