"""Moves a run's processes away from nodes that are about to leave the cluster.

Ray calls such a node draining: a spot instance is reclaimed, a pod or an autoscaler's node stops.
Nothing is placed there any more, so a process that is ended there starts elsewhere, by the path
that follows a failure. What matters is when: other processes at once, learners after a commit,
when nothing has to be learnt again.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import ray

from rlhf_ray.cluster.learner_groups import LearnerGroupClient
from rlhf_ray.cluster.ray_workers import RayWorker, kill
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.generators.member import cancel
from rlhf_ray.placement.bundles import role_of
from rlhf_ray.placement.groups import draining_nodes

INTERVAL_S = 2.0
"""Between two looks at the cluster."""
NEAR_S = 30.0
"""Learners that have so little time left do not wait for a commit."""

Groups = Mapping[str, LearnerGroupClient[Any]]
"""Role -> its group."""


class Drains:
    """Ends processes on draining nodes, each once, at the moment that costs least."""

    def __init__(
        self, workers: Callable[[], Sequence[object]], groups: Groups, say: Callable[[str], None]
    ) -> None:
        """
        Args:
            workers: returns those that run now.
            groups: the learner groups.
            say: tells the user of a node that leaves.
        """
        self._workers = workers
        self._groups = groups
        self._say = say
        self._told: set[str] = set()

    async def follow(self) -> None:
        """Look at the cluster until cancelled."""
        while True:
            with suppress(Exception):  # a head that does not answer just now is asked again
                self.leave(*await asyncio.to_thread(_look))
            await asyncio.sleep(INTERVAL_S)

    def leave(self, deadlines: Mapping[str, float], nodes: Mapping[str, str], own: str) -> None:
        """End the processes that may leave now.

        Args:
            deadlines: draining node -> when it stops, Unix seconds.
            nodes: actor -> its node, by Ray's ids.
            own: the driver's node; a run ends with it, committed, to be started again elsewhere.
        """
        for node in deadlines.keys() - self._told:
            self._told.add(node)
            left_s = deadlines[node] - time.time()
            self._say(f"Node {node[:8]} leaves the cluster in {left_s:.0f} s: roles move away")
            if node == own:
                os.kill(os.getpid(), signal.SIGTERM)
        workers = [worker for worker in self._workers() if isinstance(worker, RayWorker)]
        leaving = [
            worker
            for worker in workers
            if (node := nodes.get(worker.actor_id, "")) in deadlines and node != own
            if self._may_leave(role_of(worker.name), deadlines[node])
        ]
        groups = {role_of(worker.name) for worker in leaving} & self._groups.keys()
        for worker in workers:  # ranks of a group fail together, whichever is ended
            worker.is_moved |= worker in leaving or role_of(worker.name) in groups
        kill(leaving)

    def _may_leave(self, role: str, deadline: float) -> bool:
        group = self._groups.get(role)
        return group is None or group.is_committed or deadline - time.time() < NEAR_S


@asynccontextmanager
async def drains_followed(
    spawner: RoleSpawner, groups: Groups, say: Callable[[str], None]
) -> AsyncIterator[None]:
    """Move processes away from draining nodes of a cluster that the run has joined."""
    if not spawner.joins_cluster:
        yield
        return
    following = asyncio.ensure_future(Drains(lambda: spawner.workers, groups, say).follow())
    try:
        yield
    finally:
        await cancel([following])


def _look() -> tuple[dict[str, float], dict[str, str], str]:
    """Return the draining nodes, and, where there are any, the nodes of actors and of this."""
    deadlines = draining_nodes()
    if not deadlines:
        return {}, {}, ""
    actors = ray._private.state.actors()  # type: ignore[attr-defined]
    nodes = {
        actor: info["Address"]["NodeID"]
        for actor, info in actors.items()
        if info["State"] != "DEAD"
    }
    return deadlines, nodes, ray.get_runtime_context().get_node_id()
