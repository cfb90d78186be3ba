"""Actors that find no room, or whose node is gone or leaves; room and memory that are asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import ray
from broken_actors import Broken, Scorer, broken
from ray.autoscaler._private import commands
from ray.exceptions import ActorDiedError, ObjectLostError, RayTaskError

from rlhf_ray.cluster import ray_workers
from rlhf_ray.cluster.nodes import request_capacity
from rlhf_ray.cluster.ray_workers import RayWorker
from rlhf_ray.errors import ActorFailure, ConfigError, DataLost, NodeLeaves, PlacementError


@pytest.mark.parametrize(
    ("state", "address", "has_slot", "error"),
    [
        ("PENDING_CREATION", "", False, PlacementError),
        ("PENDING_CREATION", "", True, ActorFailure),  # its place is held
        ("PENDING_CREATION", "10.0.0.2", False, ActorFailure),
        ("ALIVE", "10.0.0.2", False, ActorFailure),
    ],
)
async def test_one_for_which_no_node_has_room_has_not_failed(
    state: str,
    address: str,
    has_slot: bool,
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"State": state, "Address": {"IPAddress": address}}
    monkeypatch.setattr(ray._private.state, "actors", lambda _: found)
    with pytest.raises(error, match=r"0\.05 s \(cluster\.start_timeout_s\)"):
        await broken(None, has_slot).call(Scorer.start)


async def test_a_start_on_a_node_that_is_gone_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray places it nowhere else, since its slot is there."""
    monkeypatch.setattr(ray_workers, "live_nodes", list)
    monkeypatch.setattr(ray_workers, "INTERVAL_S", 0.01)
    worker = RayWorker(
        *("policy-0", Broken(None), 600.0, lambda *_: None),
        start_timeout_s=300.0,
        num_gpus=1.0,
        one_at_a_time=True,
        node_id="a1",
    )
    monkeypatch.setattr(ray_workers, "draining_nodes", dict)
    with pytest.raises(ActorFailure, match="policy-0 died during start: its node is gone"):
        await worker.call(Scorer.start)
    monkeypatch.setattr(ray_workers, "draining_nodes", lambda: {"a1": 0.0})
    with pytest.raises(NodeLeaves, match="policy-0 was ended during start: its node leaves"):
        await worker.call(Scorer.start)


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        (ActorDiedError(), NodeLeaves),
        (RayTaskError("score", "", RuntimeError("gloo: connection reset")), NodeLeaves),
        (RayTaskError("score", "", ConfigError("no such key")), ConfigError),
        (RayTaskError("score", "", ObjectLostError("1f", None, "")), DataLost),
    ],
)
async def test_the_end_of_a_process_whose_node_leaves_is_no_fault(
    error: Exception, meaning: type[Exception]
) -> None:
    worker = broken(error)
    worker.is_moved = True
    with pytest.raises(meaning) as raised:
        await worker.call(Scorer.score)
    assert type(raised.value) is meaning


def test_room_is_asked_for_on_nodes_with_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own function checks its arguments."""
    asked: list[Any] = []
    monkeypatch.setattr(commands, "request_resources", lambda *request: asked.append(request))
    request_capacity([{"CPU": 1.0, "GPU": 1}, {"CPU": 1.0}], [{"role": "train"}, {}])
    request_capacity([], [])
    bundles = [{"CPU": 1.0, "GPU": 1}, {"CPU": 1.0}]
    assert asked == [(None, bundles, [{"role": "train"}, {}]), (None, [], [])]


class ManyGpus:
    """A node's GPUs as a process sees them, whether or not it was given any."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return (70, 80) if index else (76, 80)


class AsksItself:
    """An actor that runs what it is handed."""

    def __init__(self) -> None:
        self.__ray_call__ = self

    async def remote(self, call: Callable[..., int], *args: Any) -> int:
        return call(self, *args)


@pytest.mark.parametrize(("num_gpus", "is_main_memory"), [(0.0, True), (0.5, False), (2.0, False)])
async def test_only_workers_that_hold_gpus_are_asked_for_their_memory(
    monkeypatch: pytest.MonkeyPatch, num_gpus: float, is_main_memory: bool
) -> None:
    monkeypatch.setattr("torch.cuda", ManyGpus())
    worker = RayWorker(
        "reward-0",
        AsksItself(),
        600.0,
        lambda *_: None,
        start_timeout_s=300.0,
        num_gpus=num_gpus,
        one_at_a_time=True,
    )
    found = await worker.peak_memory()
    assert found > 10**6 if is_main_memory else found == 10
