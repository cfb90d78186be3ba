"""A learner group whose ranks fail: what is ended, started, loaded, and called again."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rlhf_ray.cluster.learner_groups import CriticClient, LearnerGroupClient, PolicyClient
from rlhf_ray.cluster.role_clients import Restarts
from rlhf_ray.errors import ActorFailure, ConfigError, DataLost, PlacementError
from rlhf_ray.observability.outages import Outages
from rlhf_ray.types import AdapterUpdate, AssembledStats, Mismatch, Shard, ShardInfo, StepReport

STATS = AssembledStats(1, 10, 0.5, 1.5, 2.0, 3.0, 4.0)
SHARD = Shard(ShardInfo(0, (0,), (1,), (True,), (0,)), "rollouts")
KILLED = ActorFailure("policy-1 died during learn: killed")


class Rank:
    """A rank whose weights are the list of what it has learnt; once killed it answers no more."""

    def __init__(self, name: str, faults: dict[tuple[str, str], list[Exception]]) -> None:
        self.name = name
        self.weights: tuple[Any, ...] = ()
        self.dead = asyncio.Event()
        self.calls: list[str] = []
        self._batch: Any = None
        self._faults = faults

    async def address(self) -> str:
        return "127.0.0.1"

    async def call(self, method: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(0)
        if self.dead.is_set():
            raise ActorFailure(f"{self.name} died during {method.__name__}")
        self.calls.append(method.__name__)
        for error in self._faults.get((self.name, method.__name__), [])[:1]:
            self._faults[self.name, method.__name__].pop(0)
            if error is HANGS:
                await self.dead.wait()
            raise error
        return getattr(self, f"_{method.__name__}")(*args)

    async def call_split(self, method: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
        return await self.call(method, *args)

    async def hold(self, data: Any) -> Any:
        self.calls.append("hold")
        return tuple(data.items())

    def _free_port(self) -> int:
        return 1

    def _start(self, rank: int, world: int, address: str, port: int) -> None:
        assert self.name.endswith(str(rank))

    def _assemble(self, kl_coef: float, scores: Any) -> AssembledStats:
        self._batch = kl_coef
        return STATS

    def _learn(self, mean: float, std: float, iteration: int) -> StepReport:
        self.weights = (*self.weights, (self._batch, mean, std))
        return StepReport({}, (), 1)

    def _state(self) -> tuple[Any, str]:
        return self.weights, str(self.weights)

    def _load(self, state: tuple[Any, ...]) -> None:
        self.weights = state

    def _logprobs(self, rollouts: Any) -> tuple[Any, Mismatch]:
        return self.weights, Mismatch(0.0, 0.0, 1)

    def _values(self, rollouts: Any) -> tuple[Any, None]:
        return self.weights, None

    def _adapter(self, version: int) -> tuple[Any, AdapterUpdate]:
        return self.weights, AdapterUpdate(version, str(self.weights), {}, None)


HANGS = ActorFailure("a survivor of a collective")


class Group:
    """A group of two ranks over faults by rank and method, one for each call."""

    def __init__(
        self, limit: int = 5, zero_stage: int = 2, client: type = PolicyClient, **faults: Any
    ) -> None:
        self.faults = {
            (f"policy-{rank}", method): [*errors]
            for method, by_rank in faults.items()
            for rank, errors in by_rank.items()
        }
        self.generations: list[list[Rank]] = []
        self.said: list[str] = []
        self.outages = Outages()
        restarts = Restarts(
            *(limit, "cluster.max_group_restarts", self.renew, self.said.append, self.outages),
            first_wait_s=0.0,
        )
        self.client: Any = client(self.spawn(), zero_stage, restarts)

    def spawn(self) -> list[Rank]:
        self.generations.append([Rank(f"policy-{rank}", self.faults) for rank in range(2)])
        return self.generations[-1]

    async def renew(self, ranks: Sequence[Any]) -> Any:
        for rank in self.generations[-1]:
            rank.dead.set()
        await asyncio.sleep(0)
        return self.spawn()

    def calls(self) -> list[str]:
        """Of the ranks in use."""
        first, second = (rank.calls for rank in self.generations[-1])
        assert Counter(first) - Counter(["free_port"]) == Counter(second)
        return [call for call in first if call not in ("free_port", "start")]

    async def iterate(self, number: int) -> Any:
        await self.client.assemble([], float(number))
        await self.client.learn(0.0, 1.0)
        return await self.client.state()

    async def weights(self) -> Any:
        return (await self.client.adapter(1)).tensors


LEARNT = tuple((float(number), 0.0, 1.0) for number in range(3))


@pytest.mark.parametrize("method", ["assemble", "learn", "state"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("survivor", [[], [HANGS]])
async def test_a_lost_rank_costs_nothing_and_nothing_is_learnt_twice(
    method: str, rank: int, survivor: list[Exception]
) -> None:
    group = Group()
    await group.client.start()
    for number in range(3):
        if number == 1:
            group.faults[f"policy-{rank}", method] = [KILLED]
            group.faults[f"policy-{1 - rank}", method] = survivor.copy()
        state = await asyncio.wait_for(group.iterate(number), 5)
        assert state == LEARNT[: number + 1]
    assert len(group.generations) == 2
    assert group.calls()[:2] == ["load", "assemble"]
    assert all(rank.dead.is_set() for rank in group.generations[0])
    assert group.said == [f"policy was restarted in 0 s: {KILLED}"]
    assert group.outages.restarts == {"policy": 1}


async def test_a_group_that_has_no_state_yet_starts_as_at_first() -> None:
    group = Group(learn={1: [KILLED]})
    await group.client.start()
    assert await group.iterate(0) == LEARNT[:1]
    assert group.calls() == ["assemble", "learn", "state"]


async def test_a_state_that_was_loaded_is_restored() -> None:
    """That of a resumed run, or the one before a rollback."""
    group = Group()
    await group.client.start()
    await group.client.load(("resumed",))
    group.faults["policy-0", "learn"] = [KILLED]
    assert await group.iterate(0) == ("resumed", *LEARNT[:1])
    await group.client.assemble([], 1.0)
    await group.client.learn(0.0, 1.0)
    await group.client.load(("rolled back",))
    group.generations[-1][1].dead.set()
    assert await group.weights() == ("rolled back",)
    assert group.calls() == ["load", "adapter"]


async def test_a_state_of_bytes_is_put_into_the_store_once_for_all_ranks_and_restores() -> None:
    group = Group()
    await group.client.start()
    await group.client.load({"adapter": b"1"})
    for _ in range(2):
        group.generations[-1][1].dead.set()
        assert await group.weights() == (("adapter", b"1"),), "the handle, not the bytes"
    calls = [call for made in group.generations for rank in made for call in rank.calls]
    assert (calls.count("hold"), calls.count("load")) == (1, 6)


@pytest.mark.parametrize("zero_stage", [2, 3])
async def test_calls_at_the_same_time_wait_for_one_restore(zero_stage: int) -> None:
    group = Group(zero_stage=zero_stage)
    await group.client.start()
    await group.client.load(("weights",))
    group.generations[0][1].dead.set()
    answers = await asyncio.gather(*(group.client.logprobs(SHARD) for _ in range(6)))
    assert {handle for handle, _ in answers} == {("weights",)}
    assert len(group.generations) == 2


async def test_a_critic_is_restored_as_a_policy_is() -> None:
    group = Group(client=CriticClient)
    await group.client.start()
    await group.iterate(0)
    for rank in group.generations[0]:
        rank.dead.set()
    assert await group.client.values(SHARD) == LEARNT[:1]


async def test_a_failed_restore_is_tried_again_within_the_budget() -> None:
    group = Group(limit=4, start={0: [KILLED] * 2}, load={1: [KILLED]})
    await group.client.start()
    await group.client.load(("weights",))
    assert await group.weights() == ("weights",)
    assert len(group.generations) == 4
    group.generations[-1][0].dead.set()
    group.faults["policy-1", "start"] = [KILLED]
    message = r"All 4 restarts \(cluster.max_group_restarts\) are used up\. Run again: .* resumes"
    calls = (group.weights(), group.weights(), group.weights())
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, ActorFailure)
        with pytest.raises(ActorFailure, match=message):
            raise error
    assert len(group.generations) == 5


async def test_a_state_that_is_kept_during_a_restore_is_the_one_restored() -> None:
    group = Group()
    await group.client.assemble([], 0.0)
    await group.client.learn(0.0, 1.0)
    exported = group.generations[-1][0].weights
    await group.client.load(())
    group.generations[-1][1].dead.set()
    load, client = Rank._load, group.client

    def slow_load(rank: Rank, state: tuple[Any, ...]) -> None:
        load(rank, state)
        if state != exported:
            client._keep(exported)  # an export that had its answers before the rank died ends now

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rank, "_load", slow_load)
        assert await group.weights() == exported


async def test_a_restore_that_lacks_a_batch_leaves_the_way_back_to_a_state() -> None:
    group = Group()
    await group.client.start()
    await group.client.load(("weights",))
    await group.client.assemble([], 0.0)
    group.faults["policy-0", "assemble"] = [DataLost("a batch is gone")]
    group.generations[-1][1].dead.set()
    with pytest.raises(DataLost, match="a batch is gone"):
        await group.client.learn(0.0, 1.0)
    await group.client.load(("weights",))
    assert await group.iterate(1) == ("weights", *LEARNT[1:2])
    assert group.client.is_committed


async def test_ranks_that_disagree_are_restored() -> None:
    group = Group()
    await group.client.start()
    await group.client.load(("weights",))
    group.generations[0][1].weights = ("others",)
    assert await group.weights() == ("weights",)
    assert group.outages.restarts == {"policy": 1}


@pytest.mark.parametrize("error", [ConfigError("a key"), DataLost("gone"), KeyError("column")])
async def test_what_is_no_death_ends_the_run(error: Exception) -> None:
    group = Group(learn={0: [error], 1: [error]})
    await group.client.start()
    with pytest.raises(type(error)):
        await group.iterate(0)
    assert len(group.generations) == 1


async def test_a_group_without_a_place_ends_the_run_once() -> None:
    group = Group()
    await group.client.start()
    asked: list[int] = []

    async def refuse(ranks: Any) -> Any:
        asked.append(len(ranks))
        raise PlacementError("no node has GPUs")

    group.client._restarts.renew = refuse
    group.generations[0][0].dead.set()
    group.generations[0][1].dead.set()
    calls = [group.client.logprobs(SHARD) for _ in range(3)]
    for error in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(error, PlacementError)
    assert asked == [2]


async def test_without_restarts_the_failure_of_a_rank_is_the_callers() -> None:
    ranks: Any = [Rank("policy-0", {("policy-0", "learn"): [KILLED]})]
    client: Any = LearnerGroupClient(ranks, 2)
    await client.start()
    await client.assemble([], 0.0)
    with pytest.raises(ActorFailure, match="policy-1 died during learn"):
        await client.learn(0.0, 1.0)
