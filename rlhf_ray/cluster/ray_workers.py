"""Ray actors as workers: spawned by name, called with a deadline, errors in our own words."""

import asyncio
import time
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.autoscaler.sdk import request_resources
from ray.exceptions import (
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import SchedulingStrategyT

from rlhf_ray.cluster.process_titles import titled
from rlhf_ray.cluster.role_clients import OnCall
from rlhf_ray.errors import ActorFailure, PlacementError, RlhfError
from rlhf_ray.types import Handle

STARTING = {"address", "free_port", "start"}
"""Calls that wait for a process to come up, and for what it loads."""
DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, ActorUnschedulableError)
"""What Ray raises where a process is gone: by itself, by its memory monitor, with its node."""


class RayWorker:
    """A role's class in an actor of its own."""

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
        is_seated: bool = True,
    ) -> None:
        self.name = name
        self.actor = actor
        self.num_gpus = num_gpus
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._on_call = on_call
        self._one_at_a_time = one_at_a_time
        self._is_seated = is_seated
        self._last_end_s = 0.0

    async def address(self) -> str:
        """The address of its node in the cluster."""
        node_address = self.actor.__ray_call__.remote(_node_address)
        return await self._await("address", node_address)

    async def peak_memory(self) -> int:
        """See `cluster.peak_memory`."""
        peak = self.actor.__ray_call__.remote(peak_memory, self.num_gpus > 0)
        return await self._await("peak_memory", peak)

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method and bring its result; object references among ``args`` arrive as data.

        Raises:
            ActorFailure: the process died, or did not answer in time.
            PlacementError: it never came up, as no node had room for it.
            RlhfError: what the method itself raised, if it is one of ours.
        """
        return await self._await(method, getattr(self.actor, method).remote(*args))

    async def call_split(self, method: str, *args: Any) -> tuple[Handle, Any]:
        """Call a method that returns (data, scalars); brings the scalars, pulls the data near.

        The data then outlives the actor that made it, and the node it ran on.
        """
        data, scalars = getattr(self.actor, method).options(num_returns=2).remote(*args)
        result = await self._await(method, scalars)
        ray.wait([data], fetch_local=True, timeout=0)
        return data, result

    async def _await(self, method: str, reference: Awaitable[Any]) -> Any:
        started = time.time()
        limit_s, key = self._timeout_s, "cluster.call_timeout_s"
        if method in STARTING:
            limit_s, key = self._start_timeout_s, "cluster.start_timeout_s"
        try:
            result = await asyncio.wait_for(_resolve(reference), limit_s)
        except TimeoutError:
            if method in STARTING and not self._is_seated and _awaits_a_place(self.actor):
                raise PlacementError(
                    f"No node had a CPU for {self.name} within {limit_s:g} s ({key})"
                ) from None
            raise ActorFailure(
                f"{self.name} did not answer {method} within {limit_s:g} s ({key})"
            ) from None
        except RayTaskError as error:
            if isinstance(error.cause, RlhfError):
                raise error.cause from None
            raise
        except DEATHS as error:
            raise ActorFailure(f"{self.name} died during {method}: {_first_line(error)}") from error
        ended = time.time()
        # Calls that an actor takes one at a time wait for each other, which is no work.
        began = max(started, self._last_end_s) if self._one_at_a_time else started
        self._last_end_s = ended
        self._on_call(self.name, method, began, ended)
        return result


def _node_address(_actor: Any) -> str:
    return ray.util.get_node_ip_address()


def _awaits_a_place(actor: Any) -> bool:
    """Whether no node has given an actor a process yet."""
    found = ray._private.state.actors(actor._actor_id.hex())  # type: ignore[attr-defined]
    return found.get("State") == "PENDING_CREATION" and not found["Address"]["IPAddress"]


async def _resolve(reference: Awaitable[Any]) -> Any:
    return await reference


async def fetch(handle: Handle) -> Any:
    """Bring data to the driver."""
    return await _resolve(handle)


def spawn(
    role_class: type,
    name: str,
    *args: Any,
    num_cpus: float,
    num_gpus: float,
    strategy: SchedulingStrategyT,
    concurrency: int,
    start_timeout_s: float,
    timeout_s: float,
    on_call: OnCall,
) -> RayWorker:
    """Start a role's class as a named actor."""
    options: dict[str, Any] = {
        "name": name,
        "num_cpus": num_cpus,
        "num_gpus": num_gpus,
        "scheduling_strategy": strategy,
    }
    if concurrency > 1:
        options["max_concurrency"] = concurrency
    actor = ray.remote(titled(role_class)).options(**options).remote(name, *args)
    return RayWorker(
        name,
        actor,
        timeout_s,
        on_call,
        start_timeout_s=start_timeout_s,
        num_gpus=num_gpus,
        one_at_a_time=concurrency == 1,
        is_seated=strategy is not None,
    )


def kill(workers: list[RayWorker]) -> None:
    """End actors that were told to stop already, or that do not answer."""
    for worker in workers:
        try:
            ray.kill(worker.actor)
        except RayError:
            continue


def ask_for_room(
    bundles: Sequence[Mapping[str, float]], labels: Sequence[Mapping[str, str]]
) -> None:
    """Have Ray's autoscaler, where there is one, keep nodes on which all bundles fit at once.

    It counts what runs already as part of them. Each request takes the place of the one before,
    whoever made it.

    Args:
        bundles: resources of each; none: it keeps nodes for nothing.
        labels: of the node that each is to be on.
    """
    request_resources(
        bundles=[dict(bundle) for bundle in bundles],
        bundle_label_selectors=[dict(wanted) for wanted in labels],
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def peak_memory(_actor: Any, holds_gpus: bool) -> int:
    """Bytes in use on the GPUs of this process; where it holds none, its and its children's peak.

    PyTorch and vLLM keep what they had of a GPU while they work, so what is in use at the end is
    the peak. On a GPU that is shared it is that of all who share it. With placement.turns the side
    that sleeps has given its part back: it is that of the side that worked last.

    Args:
        holds_gpus: whether the worker was given any; all GPUs of a node are seen by those who were
            not.
    """
    if holds_gpus:
        found = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
        return max(total - free for free, total in found)
    return sum(_high_water_marks(psutil.Process()))


def _high_water_marks(process: psutil.Process) -> Iterator[int]:
    for one in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{one.pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:  # it has ended meanwhile, or this system has no such file
            continue
        yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
