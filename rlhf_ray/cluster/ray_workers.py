"""Ray actors as workers: spawned by name, called with a deadline, with our own errors."""

import asyncio
import re
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import psutil
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import SchedulingStrategyT

from rlhf_ray.cluster.life_signs import INTERVAL_S, Watch, forget
from rlhf_ray.cluster.process_titles import titled
from rlhf_ray.cluster.workers import DataT, Method, OnCall, P, ProcessT_co, ResultT, ScalarsT
from rlhf_ray.errors import (
    ActorFailure,
    DataLost,
    MemoryFailure,
    NodeLeaves,
    NodeLost,
    PlacementError,
    RlhfError,
)
from rlhf_ray.observability.tracing import unix_now
from rlhf_ray.placement.groups import draining_nodes, live_nodes
from rlhf_ray.types import Handle

RoleT = TypeVar("RoleT")

STARTING = {"address", "free_port", "start"}
"""Calls that wait for a process to come up and for its model to load."""
DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, ActorUnschedulableError, ObjectLostError)
"""Ray's errors of a process that is dead, or whose answer was lost on its way to the driver."""
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
BROKEN = (*OUT_OF_MEMORY, torch.AcceleratorError, torch.distributed.DistError, ConnectionError)
"""What a process raises whose memory, GPU or connection to the other ranks of its group failed."""
BROKEN_WORDS = re.compile(r"gloo|NCCL|process group|CUDA error|cuBLAS|cuDNN|allocate memory", re.I)
"""Words of PyTorch's plain RuntimeErrors that mean the same."""
NODE_DIED = re.compile(r"node has died\. Node Id:\s+(\w+)")  # as Ray says of an actor


class RayWorker(Generic[ProcessT_co]):
    """A role in a Ray actor of its own."""

    def __init__(
        self,
        name: str,
        actor: Any,
        timeout_s: float,
        on_call: OnCall,
        *,
        start_timeout_s: float,
        num_gpus: float,
        one_at_a_time: bool,
        has_slot: bool = True,
        node_id: str | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.name = name
        self.actor = actor
        self.num_gpus = num_gpus
        self.is_moved = False
        """Whether it, or a rank of its group, is ended because its node is to leave."""
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._on_call = on_call
        self._one_at_a_time = one_at_a_time
        self._has_slot = has_slot
        self._node_id = node_id
        self._watch = watch or Watch()
        self._last_end_s = 0.0
        self._silent_s: dict[str, float] = {}
        """Method -> for how long it did not move in a call that was dropped."""
        self._found_on: str | None = None

    @property
    def actor_id(self) -> str:
        """Ray's id of its actor."""
        return self.actor._actor_id.hex()

    async def address(self) -> str:
        """Return the address of its node in the cluster."""
        return await self._await("address", self.actor.__ray_call__.remote(_node_address))

    async def peak_memory(self) -> int:
        """Return the process's peak memory, bytes; see `peak_memory` below."""
        peak = self.actor.__ray_call__.remote(peak_memory, self.num_gpus > 0)
        return await self._await("peak_memory", peak)

    async def call(
        self, method: Method[ProcessT_co, P, ResultT], *args: P.args, **kwargs: P.kwargs
    ) -> ResultT:
        """Call a method and bring its result; object references among ``args`` arrive as data.

        Raises:
            ActorFailure: the process died, or did not answer in time.
            PlacementError: it never started, because no node had resources for it.
            RlhfError: raised by the method itself.
        """
        name = method.__name__
        return await self._await(name, getattr(self.actor, name).remote(*args, **kwargs))

    async def call_split(
        self,
        method: Method[ProcessT_co, P, tuple[DataT, ScalarsT]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> tuple[Handle[DataT], ScalarsT]:
        """Call a method that returns (data, scalars); bring the scalars and the data's handle.

        Raises:
            ActorFailure: as `call`; or the data was lost before the driver's node had a copy.
        """
        name = method.__name__
        call = getattr(self.actor, name).options(num_returns=2)
        data, scalars = call.remote(*args, **kwargs)
        return await self._await(name, scalars, self._held(data, scalars))

    async def hold(self, data: DataT) -> Handle[DataT]:
        """Put data into the object store, once for all calls that it is passed to."""
        return cast("Handle[DataT]", await asyncio.to_thread(ray.put, data))

    async def _held(
        self, data: Awaitable[DataT], scalars: Awaitable[ScalarsT]
    ) -> tuple[Handle[DataT], ScalarsT]:
        """Bring a call's results; the driver's node holds the data, which its process may not.

        Only looking at the data tells whether it is there: `ray.wait` calls lost data ready. Data
        from elsewhere is put again, because Ray drops copies where memory is short.
        """
        result, value = await scalars, await data
        is_elsewhere = isinstance(data, ray.ObjectRef) and self._is_elsewhere()
        return cast("Handle[DataT]", ray.put(value) if is_elsewhere else data), result

    def _is_elsewhere(self) -> bool:
        """Return whether the process is on another node than the driver."""
        self._found_on = self._found_on or _info(self.actor)["Address"]["NodeID"]
        return self._found_on != ray.get_runtime_context().get_node_id()

    async def _await(
        self, method: str, reference: Awaitable[Any], answer: Awaitable[ResultT] | None = None
    ) -> ResultT:
        started = unix_now()
        # A generator that hangs loses each shard to another one, long before its call's deadline:
        # so the silence of dropped calls counts. A slow one moves, and to restart it is no help.
        since = started - self._silent_s.pop(method, 0.0)
        call = asyncio.ensure_future(_resolve(answer or reference))
        try:
            await self._until_done(method, call, since)
            result = call.result()
        except RayError as error:
            meaning = _meaning(error, self.name, method)
            has_died = isinstance(meaning, ActorFailure) and not isinstance(meaning, DataLost)
            if self.is_moved and has_died:
                meaning = self._moved(method)
            elif isinstance(error, DEATHS) and has_died and (node := self._lost_node(error)):
                meaning = NodeLost(str(meaning), node)
            raise meaning from (error if isinstance(meaning, ActorFailure) else None)
        finally:
            if not call.done():
                silent_s = self._watch.silent_s(self.name, self.actor_id, since)
                self._silent_s[method] = max(silent_s, self._silent_s.get(method, 0.0))
                call.cancel()
                # Of calls that wait in line, one that is dropped on one rank of a group leaves the
                # others alone in its collectives.
                if not self._one_at_a_time:
                    _abort(reference)
        ended = unix_now()
        # Calls to an actor that takes one at a time queue behind each other: queueing is not work.
        began = max(started, self._last_end_s) if self._one_at_a_time else started
        self._last_end_s = ended
        self._on_call(self.name, method, began, ended)
        return result

    async def _until_done(self, method: str, call: "asyncio.Future[Any]", since: float) -> None:
        """Wait while the process, or another one of its learner group, makes progress."""
        is_start = method in STARTING
        limit_s = self._start_timeout_s if is_start else self._timeout_s
        key = f"cluster.{'start' if is_start else 'call'}_timeout_s"
        began = time.strftime("%H:%M:%S", time.localtime(since))
        while not (await asyncio.wait([call], timeout=min(INTERVAL_S, limit_s / 4)))[0]:
            # It may have queued behind other calls until then.
            since = max(since, self._last_end_s) if self._one_at_a_time else since
            if is_start and (node := self._lost_node()):
                gone = f"{self.name} died during {method}: its node is gone"
                raise self._moved(method) if node in draining_nodes() else NodeLost(gone, node)
            reason = await self._watch.overdue(self.name, self.actor_id, since, limit_s, key)
            if reason is None or call.done():
                continue
            if is_start and not self._has_slot and _is_unplaced(self.actor):
                raise PlacementError(
                    f"No node had a CPU for {self.name} within {limit_s:g} s ({key})"
                )
            raise ActorFailure(
                f"{self.name} did not answer {method}, awaited by the driver since {began}, "
                f"{reason}"
            )

    def _moved(self, method: str) -> NodeLeaves:
        return NodeLeaves(f"{self.name} was ended during {method}: its node leaves the cluster")

    def _lost_node(self, error: RayError | None = None) -> str | None:
        """Return its node where that is gone, and Ray would wait there for ever; else None."""
        found = NODE_DIED.search(str(error))
        node = found[1] if found else self._node_id or self._found_on
        return node if found or (node and all(n.id != node for n in live_nodes())) else None


def _abort(reference: Awaitable[Any]) -> None:
    """Have a call that nobody waits for any longer end early."""
    if isinstance(reference, ray.ObjectRef):
        with suppress(RayError):
            ray.cancel(reference)


def _node_address(_actor: object) -> str:
    return ray.util.get_node_ip_address()


def _is_unplaced(actor: ActorHandle) -> bool:
    """Return whether no node has started the actor's process yet."""
    info = _info(actor)
    return info.get("State") == "PENDING_CREATION" and not info["Address"]["IPAddress"]


def _info(actor: ActorHandle) -> dict[str, Any]:
    return ray._private.state.actors(actor._actor_id.hex())  # type: ignore[attr-defined]


async def _resolve(answer: Awaitable[ResultT]) -> ResultT:
    return await answer  # `asyncio.ensure_future` takes no object reference


def _meaning(error: RayError, worker: str, method: str) -> Exception:
    """Return what the error of a call means: ours, a lost process, or what the method raised."""
    raised = error
    if isinstance(error, ActorDiedError) and error.actor_init_failed:
        (raised,) = error.args  # by the constructor: as good as by the call
    if isinstance(raised, RayTaskError):
        cause = raised.cause
        if isinstance(cause, RlhfError):
            return cause
        if isinstance(cause, ObjectLostError):
            return DataLost(
                f"What {worker} needed for {method} was lost: {_first_line(cause)}. Run again: the "
                "run resumes at its last commit"
            )
        words = BROKEN_WORDS.search(str(cause)) if isinstance(cause, RuntimeError) else None
        if isinstance(cause, BROKEN) or words:
            kind = MemoryFailure if isinstance(cause, OUT_OF_MEMORY) else ActorFailure
            what = f"{type(cause).__name__}: {_first_line(cause)}"
            return kind(f"{worker} failed during {method}: {what}")
        return raised.as_instanceof_cause()
    if isinstance(error, DEATHS):
        return ActorFailure(f"{worker} died during {method}: {_first_line(error)}")
    return error


def spawn(
    role_class: type[RoleT],
    name: str,
    *args: object,
    num_cpus: float,
    num_gpus: float,
    strategy: SchedulingStrategyT,
    node_id: str | None,
    concurrency: int,
    environment: Mapping[str, str],
    start_timeout_s: float,
    timeout_s: float,
    on_call: OnCall,
    watch: Watch,
    actor: Any = None,
) -> RayWorker[RoleT]:
    """Start a role's class as a named actor; ``actor`` is one that was made alike before."""
    options: dict[str, Any] = {
        "name": name,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "scheduling_strategy": strategy,
    }
    if environment:  # on top of the run's
        options["runtime_env"] = {"env_vars": dict(environment)}
    if concurrency > 1:
        options["max_concurrency"] = concurrency
    actor = actor or ray.remote(titled(role_class)).options(**options).remote(name, *args)
    return RayWorker(
        name,
        actor,
        timeout_s,
        on_call,
        start_timeout_s=start_timeout_s,
        num_gpus=num_gpus,
        one_at_a_time=concurrency == 1,
        has_slot=strategy is not None,
        node_id=node_id,
        watch=watch,
    )


def kill(workers: Sequence[RayWorker[object]]) -> None:
    """Kill actors that have been stopped already, or that do not answer."""
    for worker in workers:
        with suppress(RayError):
            ray.kill(worker.actor)
        forget(worker.actor._actor_id.hex())


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def peak_memory(_actor: object, holds_gpus: bool) -> int:
    """Return the bytes in use on this process's GPUs; without GPUs, its and its children's peak.

    PyTorch and vLLM keep the GPU memory that they once had, so the use at the end is the peak. On a
    shared GPU it is the use of all processes on it. With placement.turns the sleeping group has
    freed its memory, so it is that of the group that worked last.

    Args:
        holds_gpus: whether the worker was given any; without, it would see all GPUs of its node.
    """
    if holds_gpus:
        memory = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
        return max(total - free for free, total in memory)
    return sum(_high_water_marks(psutil.Process()))


def _high_water_marks(process: psutil.Process) -> Iterator[int]:
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:  # the process has ended, or this system has no /proc
            continue
        yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
