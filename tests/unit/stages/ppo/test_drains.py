"""Processes leave nodes that drain: at once, learners after a commit."""

import asyncio
import os
import signal
import time
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.cluster.ray_workers import RayWorker
from rlhf_ray.stages.ppo import drains
from rlhf_ray.stages.ppo.drains import Drains, drains_followed

ROLES = ("generator-0", "reward-0", "policy-0", "policy-1", "critic-0")
NODES = {name: "away" if name != "policy-1" else "stays" for name in ROLES}


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the workers that were killed."""
    names: list[str] = []
    monkeypatch.setattr(drains, "kill", lambda workers: names.extend(w.name for w in workers))
    return names


def worker(name: str) -> RayWorker[Any]:
    actor = SimpleNamespace(_actor_id=SimpleNamespace(hex=lambda: name))
    return RayWorker(
        name,
        actor,
        1.0,
        lambda *_: None,
        start_timeout_s=1.0,
        num_gpus=0,
        one_at_a_time=True,
    )


def leaver(
    said: list[str], *, is_committed: bool, workers: list[RayWorker[Any]] | None = None
) -> Drains:
    workers = workers or [worker(name) for name in ROLES]
    group: Any = SimpleNamespace(is_committed=is_committed)
    return Drains(lambda: workers, {"policy": group, "critic": group}, said.append)


def test_learners_leave_after_their_commit_and_others_at_once(killed: list[str]) -> None:
    said: list[str] = []
    deadlines = {"away": time.time() + 300}
    leaver(said, is_committed=False).leave(deadlines, NODES, "driver")
    assert killed == ["generator-0", "reward-0"]
    killed.clear()
    leaver(said, is_committed=True).leave(deadlines, NODES, "driver")
    assert killed == ["generator-0", "reward-0", "policy-0", "critic-0"]
    assert said[0].endswith("leaves the cluster in 300 s: roles move away")


def test_processes_that_leave_and_the_other_ranks_of_their_groups_fail_by_no_fault(
    killed: list[str],
) -> None:
    workers = [worker(name) for name in (*ROLES, "reward-1")]
    nodes, deadlines = NODES | {"reward-1": "stays"}, {"away": time.time() + 300}
    moved: list[list[str]] = []
    for is_committed in (False, True):
        leaver([], is_committed=is_committed, workers=workers).leave(deadlines, nodes, "driver")
        moved.append([each.name for each in workers if each.is_moved])
    assert moved == [["generator-0", "reward-0"], [*ROLES]]


def test_learners_without_time_for_a_commit_leave_at_once(killed: list[str]) -> None:
    leaver([], is_committed=False).leave({"away": time.time() + 10}, NODES, "driver")
    assert killed == ["generator-0", "reward-0", "policy-0", "critic-0"]


def test_a_run_whose_drivers_node_leaves_is_interrupted_once(
    killed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *of: signals.append(of))
    drain = leaver([], is_committed=True)
    for _ in range(2):
        drain.leave({"away": time.time() + 60}, NODES, "away")
    assert signals == [(os.getpid(), signal.SIGTERM)]
    assert killed == [], "they end with the run, which commits first"


@pytest.mark.parametrize("joins", [True, False])
async def test_a_stage_on_a_joined_cluster_leaves_nodes_that_drain(
    killed: list[str], monkeypatch: pytest.MonkeyPatch, joins: bool
) -> None:
    spawner: Any = SimpleNamespace(joins_cluster=joins, workers=[worker("reward-0")])
    monkeypatch.setattr(drains, "_look", lambda: ({"away": time.time() + 60}, NODES, "driver"))
    async with drains_followed(spawner, {}, lambda _: None):
        for _ in range(100 * joins):
            await asyncio.sleep(0.01)
            if killed:
                break
    assert killed == ["reward-0"] * joins
