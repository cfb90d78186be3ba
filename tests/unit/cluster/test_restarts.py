"""Workers of stateless roles that die, are replaced, and are waited for."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ObjectLostError

from rlhf_ray.cluster import role_clients
from rlhf_ray.cluster.role_clients import Crew, Restarts, ScorerClient
from rlhf_ray.cluster.workers import fetch
from rlhf_ray.errors import (
    ActorFailure,
    DataLost,
    MemoryFailure,
    NodeLeaves,
    NodeLost,
    PlacementError,
    RlhfError,
)
from rlhf_ray.observability.outages import Outages
from rlhf_ray.roles import ReferenceProcess, ScorerProcess
from rlhf_ray.types import Shard, ShardInfo

SHARD = Shard(ShardInfo(0, (0,), (1,), (True,), (0,)), "rollouts")


class Mortal:
    """Fails a call for each error that it was given, by method."""

    def __init__(self, name: str, log: list[str], errors: dict[str, list[Exception]]) -> None:
        self.name = name
        self._log, self._errors = log, errors

    async def call(self, method: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(0)
        self._log.append(f"{self.name} {method.__name__}")
        if self._errors.get(method.__name__):
            raise self._errors[method.__name__].pop(0)
        return self.name


class Deaths:
    """What happened to workers that are replaced by others of the same name with a mark."""

    def __init__(self, limit: int = 10, **errors: list[Exception]) -> None:
        self.errors = errors
        self.no_place = 0
        """How many attempts find none from now on."""
        self.log: list[str] = []
        self.said: list[str] = []
        self.outages = Outages()
        self.restarts = Restarts(
            *(limit, "cluster.max", self.renew, self.said.append, self.outages), first_wait_s=0.0
        )

    def worker(self, name: str, errors: dict[str, list[Exception]] | None = None) -> Mortal:
        return Mortal(name, self.log, self.errors if errors is None else errors)

    async def renew(self, workers: Any) -> Any:
        self.log.append(f"renew {' '.join(worker.name for worker in workers)}")
        await asyncio.sleep(0)
        if self.no_place:
            self.no_place -= 1
            raise PlacementError("No node had a GPU for it")
        return [self.worker(f"{worker.name}'") for worker in workers]


def died(number: int = 1) -> list[Exception]:
    return [ActorFailure("reward-0 died during score: killed")] * number


async def test_a_call_goes_to_another_worker_while_a_dead_one_is_replaced() -> None:
    deaths = Deaths()
    crew: Any = Crew(
        [deaths.worker("reward-0", {"score": died(3)}), deaths.worker("reward-1")], deaths.restarts
    )
    scorer = ScorerClient(crew)
    answers: list[Any] = list(await asyncio.gather(*(scorer.score(SHARD) for _ in range(6))))
    assert answers == ["reward-1"] * 6
    assert deaths.log.count("renew reward-0") == 1, "three of its calls failed"
    answers = [await scorer.score(SHARD) for _ in range(4)]
    assert set(answers) == {"reward-0'", "reward-1"}
    assert deaths.said == [
        "reward-0 was restarted in 0 s: reward-0 died during score: killed",
    ]
    assert deaths.outages.restarts == {"reward": 1}


async def test_a_call_waits_for_the_only_worker_to_come_back() -> None:
    deaths = Deaths(start=died(2))
    crew: Any = Crew([deaths.worker("reference-0", {"logprobs": died()})], deaths.restarts)
    assert await crew.ask(lambda worker: worker.call(ReferenceProcess.logprobs)) == "reference-0'"
    assert deaths.log == [
        "reference-0 logprobs",
        *["renew reference-0", "reference-0' start"] * 3,
        "reference-0' logprobs",
    ]


async def test_a_worker_that_dies_in_its_first_start_is_started_again() -> None:
    deaths = Deaths()
    crew: Any = Crew([deaths.worker("reward-0", {"start": died()})], deaths.restarts)
    await crew.start()
    assert deaths.log == ["reward-0 start", "renew reward-0", "reward-0' start"]


async def test_restarts_that_are_used_up_end_the_run_with_the_last_worker() -> None:
    deaths = Deaths(limit=2, score=died(100))
    crew: Any = Crew([deaths.worker("reward-0"), deaths.worker("reward-1")], deaths.restarts)
    with pytest.raises(ActorFailure, match=r"All 2 restarts \(cluster.max\) are used up\. Run aga"):
        await ScorerClient(crew).score(SHARD)
    assert sum("renew" in line for line in deaths.log) == 2


async def test_moves_from_a_node_that_leaves_use_up_no_restarts() -> None:
    moved: list[Exception] = [NodeLeaves("reward-0 was ended during score: its node leaves the cl")]
    deaths = Deaths(limit=1, score=[*moved * 3, *died()])
    crew: Any = Crew([deaths.worker("reward-0")], deaths.restarts)
    assert await crew.ask(lambda worker: worker.call(ScorerProcess.score)) == "reward-0''''"
    assert deaths.outages.restarts == {"reward": 4}
    deaths.errors["score"] = died()
    with pytest.raises(ActorFailure, match="All 1 restarts"):
        await crew.ask(lambda worker: worker.call(ScorerProcess.score))


async def test_the_loss_of_a_node_costs_one_restart_whatever_it_took_along() -> None:
    deaths = Deaths(limit=1)
    lost = [NodeLost(f"reward-{rank} died during score: its node", "node-a") for rank in range(3)]
    crew: Any = Crew(
        [deaths.worker(f"reward-{rank}", {"score": [lost[rank]]}) for rank in range(3)],
        deaths.restarts,
    )
    scorer = ScorerClient(crew)
    await asyncio.gather(*(scorer.score(SHARD) for _ in range(6)))
    await until(lambda: len(deaths.said) == 3)
    assert deaths.outages.restarts == {"reward": 3}, "processes are told as they are"
    deaths.errors["score"] = [NodeLost("reward-0 died during score: its node", "node-b")] * 3
    with pytest.raises(ActorFailure, match="All 1 restarts"):
        await asyncio.gather(*(scorer.score(SHARD) for _ in range(6)))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_so():
            await asyncio.sleep(0)


async def test_a_worker_without_a_place_returns_when_there_is_one() -> None:
    deaths = Deaths(limit=1)
    deaths.no_place = 5
    crew: Any = Crew(
        [deaths.worker("reward-0", {"score": died()}), deaths.worker("reward-1")], deaths.restarts
    )
    scorer = ScorerClient(crew)
    answers: list[Any] = [await scorer.score(SHARD) for _ in range(2)]
    assert answers == ["reward-1"] * 2, "the other one works meanwhile"
    await until(lambda: "reward-0' start" in deaths.log)
    await until(lambda: bool(deaths.outages.restarts))
    assert {await scorer.score(SHARD) for _ in range(2)} == {"reward-0'", "reward-1"}
    assert deaths.log.count("renew reward-0") == 6
    assert deaths.said[0] == (
        "reward-0 has no place, and is tried again later: No node had a GPU for it"
    )
    assert deaths.outages.restarts == {"reward": 1}


async def test_a_worker_that_waits_for_a_place_leaves_the_restarts_to_others() -> None:
    deaths = Deaths(limit=1)
    deaths.no_place = 10**6
    crew: Any = Crew(
        [deaths.worker("reward-0", {"score": died()}), deaths.worker("reward-1")], deaths.restarts
    )
    await ScorerClient(crew).score(SHARD)
    await until(lambda: len(deaths.said) > 3)
    deaths.no_place = 0
    await until(lambda: bool(deaths.outages.restarts))
    assert deaths.restarts._used == 1


async def test_where_no_worker_is_left_and_none_finds_a_place_the_run_ends_to_be_resumed() -> None:
    deaths = Deaths()
    deaths.no_place = 10**6
    crew: Any = Crew(
        [deaths.worker(f"reward-{rank}", {"score": died()}) for rank in range(2)], deaths.restarts
    )
    with pytest.raises(PlacementError, match=r"No node had a GPU for it\. Run again: the run res"):
        await asyncio.wait_for(ScorerClient(crew).score(SHARD), 5)


async def test_waits_for_a_place_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def attempt() -> str:
        if len(waits) < 9:
            raise PlacementError("No node had a GPU for it")
        return "started"

    monkeypatch.setattr(role_clients.asyncio, "sleep", sleep)
    restarts = Restarts(1, "key", Deaths().renew, print, Outages(), first_wait_s=1.0)
    lacking = MemoryFailure("reward-0 failed during score: OutOfMemoryError: CUDA out of memory")
    assert (
        await restarts.again(
            "reward-0", lacking, attempt, is_waited_for=False, may_wait=lambda: True
        )
        == "started"
    )
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]


async def test_a_first_start_waits_for_no_place_that_never_comes() -> None:
    deaths = Deaths()
    deaths.no_place = 10**6
    crew: Any = Crew(
        [deaths.worker("reward-0", {"start": died()}), deaths.worker("reward-1")], deaths.restarts
    )
    with pytest.raises(PlacementError, match="No node had a GPU for it"):
        await asyncio.wait_for(crew.start(), 5)


@pytest.mark.parametrize("error", [RlhfError("rewards: mine raised KeyError"), DataLost("gone")])
async def test_an_error_that_no_other_worker_can_help_is_not_retried(error: Exception) -> None:
    deaths = Deaths(score=[error])
    crew: Any = Crew([deaths.worker("reward-0")], deaths.restarts)
    with pytest.raises(type(error)):
        await ScorerClient(crew).score(SHARD)
    assert deaths.log == ["reward-0 score"]


async def test_without_restarts_a_failure_is_the_callers() -> None:
    """Inline there is no process to lose."""
    deaths = Deaths()
    crew: Any = Crew([deaths.worker("reward-0", {"score": died()})])
    with pytest.raises(ActorFailure):
        await ScorerClient(crew).score(SHARD)


async def test_waits_between_restarts_grow_until_something_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    deaths = Deaths()
    restarts = Restarts(10, "key", deaths.renew, print, Outages(), first_wait_s=1.0)
    monkeypatch.setattr(role_clients.asyncio, "sleep", sleep)
    failures = died(4)

    async def attempt() -> None:
        if failures:
            raise failures.pop()

    await restarts.again("policy", failures[0], attempt, is_waited_for=True)
    assert waits == [0.0, 1.0, 2.0, 4.0, 8.0]
    restarts.worked("policy")
    await restarts.again("policy", died()[0], attempt, is_waited_for=True)
    assert waits[5:] == [0.0]


async def test_what_lacks_memory_again_does_not_fit() -> None:
    attempts: list[int] = []

    async def attempt() -> None:
        attempts.append(1)
        raise MemoryFailure("policy-0 failed during start: OutOfMemoryError: CUDA out of memory")

    lacking = MemoryFailure("policy-0 failed during learn: OutOfMemoryError: CUDA out of memory")
    restarts = Deaths().restarts
    with pytest.raises(MemoryFailure, match="during start"):
        await restarts.again("policy", lacking, attempt, is_waited_for=True)
    with pytest.raises(MemoryFailure, match="during learn"):
        await restarts.again("policy", lacking, attempt, is_waited_for=True)
    assert attempts == [1]


async def test_data_that_ray_has_lost_is_an_error_of_ours() -> None:
    handle = asyncio.get_running_loop().create_future()
    handle.set_exception(ObjectLostError("a1", "", ""))
    with pytest.raises(DataLost, match="the run resumes at its last commit"):
        await fetch(handle)  # type: ignore[arg-type]


async def test_a_role_without_a_place_says_so_and_that_the_run_resumes() -> None:
    async def attempt() -> None:
        raise PlacementError("No node had a CPU.")

    with pytest.raises(PlacementError, match=r"killed\. It cannot be placed again: No .*Run a"):
        await Deaths().restarts.again("policy", died()[0], attempt, is_waited_for=True)  # type: ignore[arg-type]
