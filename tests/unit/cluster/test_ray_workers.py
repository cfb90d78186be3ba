import asyncio
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from broken_actors import Scorer, broken
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayTaskError,
)

from rlhf_ray.cluster import ray_workers
from rlhf_ray.cluster.ray_workers import RayWorker
from rlhf_ray.errors import (
    ActorFailure,
    ConfigError,
    DataLost,
    DivergenceError,
    NodeLost,
    RlhfError,
)


class Method:
    """An actor's method that answers after as many seconds as it is told."""

    def __init__(self, clock: "Clock") -> None:
        self._clock = clock

    def remote(self, done_at_s: float) -> Awaitable[float]:
        return self._clock.reaches(done_at_s)


class Clock:
    """Unix time of a test."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    async def reaches(self, then_s: float) -> float:
        for _ in range(10 * int(then_s - self.now_s)):  # whoever waits for it reads the clock first
            await asyncio.sleep(0)
        self.now_s = then_s
        return then_s


class Actor:
    """A handle with one method."""

    def __init__(self, clock: Clock) -> None:
        self.score = Method(clock)


@pytest.mark.parametrize(
    ("one_at_a_time", "expected"),
    [
        (True, [(100.0, 104.0), (104.0, 107.0)]),
        (False, [(100.0, 104.0), (100.0, 107.0)]),
    ],
)
async def test_waiting_for_the_call_before_is_no_work(
    monkeypatch: pytest.MonkeyPatch, one_at_a_time: bool, expected: list[tuple[float, float]]
) -> None:
    clock, calls = Clock(), []
    monkeypatch.setattr(ray_workers, "unix_now", clock)

    def on_call(_name: str, _method: str, start_s: float, end_s: float) -> None:
        calls.append((start_s, end_s))

    actor: Any = Actor(clock)
    worker = RayWorker(
        "reward-0",
        actor,
        600.0,
        on_call,
        start_timeout_s=300.0,
        num_gpus=0.0,
        one_at_a_time=one_at_a_time,
    )
    await asyncio.gather(worker.call(Scorer.score, 104.0), worker.call(Scorer.score, 107.0))
    assert calls == expected


def worker_over(handle: Any) -> RayWorker:
    return RayWorker(
        *("reference-0", handle, 600.0, lambda *_: None),
        start_timeout_s=300.0,
        num_gpus=0.0,
        one_at_a_time=True,
    )


@pytest.mark.parametrize(
    "death",
    [
        ActorDiedError(),
        OutOfMemoryError("Ray's memory monitor killed it"),
        NodeDiedError("its node is gone"),
    ],
)
async def test_a_process_that_is_gone_is_a_failure_of_its_actor_whoever_ended_it(
    death: Exception,
) -> None:
    with pytest.raises(ActorFailure, match="generator-0 died during score"):
        await broken(death).call(Scorer.score)


class Answers:
    """A handle whose method answers with data and scalars, each when it is told."""

    def __init__(self, data: Awaitable[Any], scalars: Awaitable[Any]) -> None:
        self.logprobs = self
        self._answer = data, scalars

    def options(self, num_returns: int) -> "Answers":
        assert num_returns == 2
        return self

    def remote(self) -> tuple[Awaitable[Any], Awaitable[Any]]:
        return self._answer


class _Reference:
    def logprobs(self) -> tuple[list[float], str]: ...


async def test_data_counts_once_a_copy_is_on_the_drivers_node() -> None:
    data, scalars = (asyncio.get_running_loop().create_future() for _ in range(2))
    call = asyncio.ensure_future(
        worker_over(Answers(data, scalars)).call_split(_Reference.logprobs)
    )
    scalars.set_result("scalars")
    await asyncio.sleep(0.01)
    assert not call.done()
    data.set_result([0.0])
    assert await call == (data, "scalars")


@pytest.mark.parametrize("lost", [ObjectLostError("a1", "", ""), OwnerDiedError("a1", "", "")])
async def test_data_that_is_lost_on_its_way_is_a_failure_of_its_actor(lost: Exception) -> None:
    data, scalars = (asyncio.get_running_loop().create_future() for _ in range(2))
    scalars.set_result("scalars")
    data.set_exception(lost)
    with pytest.raises(ActorFailure, match="reference-0 died during logprobs"):
        await worker_over(Answers(data, scalars)).call_split(_Reference.logprobs)


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("score", "Traceback", cause, "actor", 1, "127.0.0.1")


def raised(cause: Exception) -> RayTaskError:
    """As Ray hands over what an actor's method raised."""
    return task_error(cause).as_instanceof_cause()


@pytest.mark.parametrize(
    "cause",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1"),
        torch.distributed.DistNetworkError("the client socket has timed out"),
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
async def test_a_process_whose_memory_gpu_or_group_fails_is_lost(cause: Exception) -> None:
    message = f"generator-0 failed during score: {type(cause).__name__}"
    with pytest.raises(ActorFailure, match=message):
        await broken(raised(cause)).call(Scorer.score)


@pytest.mark.parametrize(
    "cause",
    [
        ConfigError("a key"),
        DivergenceError("a loss is not finite"),
        RlhfError("rewards: mine raised RuntimeError"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        TimeoutError("of a user's own"),
        KeyError("column"),
    ],
)
async def test_what_a_method_raises_of_its_own_is_raised_here(cause: Exception) -> None:
    with pytest.raises(type(cause)) as error:
        await broken(raised(cause)).call(Scorer.score)
    assert not isinstance(error.value, ActorFailure)


async def test_what_a_constructor_raises_is_no_death() -> None:
    """A model that cannot be read cannot be read by the next process either."""
    with pytest.raises(ConfigError, match="a key"):
        await broken(ActorDiedError(task_error(ConfigError("a key")))).call(Scorer.score)
    with pytest.raises(FileNotFoundError):
        await broken(ActorDiedError(task_error(FileNotFoundError()))).call(Scorer.score)
    with pytest.raises(ActorFailure, match="failed during score: OutOfMemoryError"):
        await broken(ActorDiedError(task_error(torch.OutOfMemoryError("m")))).call(Scorer.score)


async def test_data_of_another_node_is_put_on_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reference(asyncio.Future):  # type: ignore[type-arg]
        pass

    data, scalars = Reference(), asyncio.get_running_loop().create_future()
    data.set_result([1.0])
    scalars.set_result("scalars")
    monkeypatch.setattr(ray, "ObjectRef", Reference)
    monkeypatch.setattr(ray, "put", lambda value: ("put", value))
    here = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    for node, held in (("here", data), ("there", ("put", [1.0]))):
        worker = worker_over(Answers(data, scalars))
        monkeypatch.setattr(
            ray_workers, "_info", lambda _, node=node: {"Address": {"NodeID": node}}
        )
        assert await worker.call_split(_Reference.logprobs) == (held, "scalars")


async def test_data_of_the_driver_is_put_into_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "put", lambda value: ("put", value))
    assert await broken(None).hold({"adapter": b"1"}) == ("put", {"adapter": b"1"})


async def test_only_calls_of_actors_that_take_several_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dropped: list[str] = []
    monkeypatch.setattr(ray_workers, "_abort", lambda _: dropped.append("call"))
    for one_at_a_time, expected in ((True, []), (False, ["call"])):
        worker = broken(None)
        worker._one_at_a_time = one_at_a_time
        call = asyncio.ensure_future(worker.call(Scorer.score))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert dropped == expected


async def test_a_call_whose_argument_is_lost_is_no_fault_of_its_process() -> None:
    with pytest.raises(DataLost, match=r"What generator-0 needed for score was lost: .*resumes"):
        await broken(raised(ObjectLostError("a1", "", ""))).call(Scorer.score)


async def test_a_process_that_died_with_its_node_says_with_which() -> None:
    death = ActorDiedError()
    death.error_msg += "\nThe actor died because its node has died. Node Id: 3fe1a0\n\treason: x"
    with pytest.raises(NodeLost, match="generator-0 died during score") as lost:
        await broken(death).call(Scorer.score)
    assert lost.value.node == "3fe1a0"
