"""Tests of shards whose generator is far slower than the others: issued again, counted once."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from elastic import Elastic, requests, settle

from rlhf_ray.cluster.life_signs import LifeSign, Watch
from rlhf_ray.cluster.ray_workers import RayWorker
from rlhf_ray.cluster.role_clients import GeneratorClient
from rlhf_ray.generators import dispatch


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LOOK_S", 0.001)


async def look() -> None:
    await asyncio.sleep(0.01)
    await settle()


async def straggling(elastic: Elastic, seconds: float = 100.0) -> "asyncio.Future[None]":
    """Two generators with a shard each: the first takes ``seconds``, the second has taken 20."""
    batch = await elastic.begin(2, 1)
    elastic.now += 20
    elastic[1].answer(1)
    await settle()
    elastic.now += seconds - 20
    await look()
    return batch


@pytest.mark.parametrize("winner", [0, 1])
async def test_a_straggling_shard_is_sampled_elsewhere_and_the_first_answer_counts(
    winner: int,
) -> None:
    elastic = Elastic(2)
    batch = await straggling(elastic)
    assert elastic[0].holds == elastic[1].holds == [0]
    elastic[winner].answer(0)
    await batch
    assert elastic.done == [(1, "generator-1"), (0, f"generator-{winner}")]
    assert elastic[0].holds == elastic[1].holds == [], "the other's call is cancelled"
    report = elastic.pool.report()
    assert (report.samples_reissued, report.samples_requeued, report.restarts) == (1, 0, 0)


async def test_both_answers_at_once_count_once() -> None:
    elastic = Elastic(2)
    batch = await straggling(elastic)
    elastic[0].answer(0)
    elastic[1].answer(0)
    await batch
    assert len(elastic.done) == 2


async def test_a_straggler_gets_its_shard_back_no_second_time() -> None:
    elastic = Elastic(3)
    batch = await straggling(elastic)
    await look()
    assert sum(made.holds == [0] for made in elastic.processes.started) == 2
    await elastic.answer_all()
    await batch


@pytest.mark.parametrize("dies", [0, 1])
async def test_a_shard_at_two_generators_stays_with_the_one_that_lives(dies: int) -> None:
    elastic = Elastic(2)
    batch = await straggling(elastic)
    alive = elastic[1 - dies]
    elastic[dies].die()
    await settle()
    assert elastic.pool.report().samples_requeued == 0
    assert [made.holds for made in elastic.processes.started if made is alive] == [[0]]
    alive.answer(0)
    await batch
    assert elastic.done[-1] == (0, alive.name)


@pytest.mark.parametrize(
    ("factor", "seconds"), [(None, 1000.0), (2.0, 39.0), (10.0, 199.0)], ids=str
)
async def test_what_takes_no_longer_than_the_factor_is_waited_for(
    factor: float | None, seconds: float
) -> None:
    elastic = Elastic(2, straggler_factor=factor)
    batch = await straggling(elastic, seconds)
    assert elastic[1].holds == []
    await elastic.answer_all()
    await batch


async def test_short_shards_are_not_issued_again() -> None:
    elastic = Elastic(2)
    batch = await elastic.begin(2, 1)
    elastic.now += 1
    elastic[1].answer(1)
    await settle()
    elastic.now += 8
    await look()
    assert elastic[1].holds == []
    await elastic.answer_all()
    await batch


async def test_one_that_is_full_of_later_shards_takes_a_straggler_all_the_same() -> None:
    elastic = Elastic(2, max_in_flight=1)
    await elastic.begin()
    batch = await elastic.ask(requests(2, 1), or_newer=True)
    later = await elastic.ask(requests(5, 4, 3, start=2), or_newer=True)
    elastic.now += 20
    elastic[1].answer(1)
    await settle()
    assert (elastic[0].holds, elastic[1].holds) == ([0], [2])
    elastic.now += 100
    await look()
    assert (elastic[0].holds, elastic[1].holds) == ([0], [0, 2])
    await elastic.answer_all()
    await asyncio.gather(batch, later)
    assert elastic.pool.report().samples_reissued == 1


async def test_a_generator_with_shards_of_its_own_takes_no_straggler() -> None:
    elastic = Elastic(2)
    batch = await elastic.begin(3, 2, 1)
    assert (elastic[0].holds, elastic[1].holds) == ([0, 2], [1])
    elastic.now += 20
    elastic[0].answer(2)
    await settle()
    elastic.now += 500
    await look()
    assert (elastic[0].holds, elastic[1].holds) == ([0], [1])
    elastic[0].answer(0)
    await settle()
    elastic.now += 600  # 1,120 s in all, more than twice as long as the 520 s of the other
    await look()
    assert elastic[0].holds == [1]
    await elastic.answer_all()
    await batch


async def test_a_lone_generator_never_samples_twice() -> None:
    elastic = Elastic(1)
    batch = await elastic.begin(2, 1)
    elastic[0].answer(1)
    await settle()
    elastic.now += 500
    await look()
    assert elastic[0].begun == [0, 1]
    await elastic.answer_all()
    await batch


async def test_the_next_batch_is_watched_too() -> None:
    elastic = Elastic(2)
    first = await straggling(elastic)
    await elastic.answer_all()
    await first
    second = await elastic.ask(requests(2, 1))
    elastic.now += 20
    elastic[1].answer(1)
    await settle()
    elastic.now += 80
    await look()
    assert elastic[1].holds == [0]
    await elastic.answer_all()
    await second
    assert elastic.pool.report().samples_reissued == 2


class Hanging:
    """An actor that answers health checks and samples nothing."""

    _actor_id = SimpleNamespace(hex=lambda: "a1")

    def __init__(self) -> None:
        self.generate = self

    def options(self, num_returns: int) -> "Hanging":
        return self

    def remote(self, _request: object) -> tuple[Any, Any]:
        data, scalars = (asyncio.get_running_loop().create_future() for _ in range(2))
        return data, scalars


async def test_one_that_hangs_is_replaced_though_it_loses_every_shard_to_another() -> None:
    elastic = Elastic(2)
    silent: Any = Watch(lambda _: LifeSign("12 tokens sampled"))
    worker: Any = RayWorker(
        *("generator-0", Hanging(), 0.4, lambda *_: None),
        start_timeout_s=60.0,
        num_gpus=0.0,
        one_at_a_time=False,
        watch=silent,
    )
    hanging: Any = elastic[0]
    hanging.generate = GeneratorClient(worker).generate
    await (await elastic.begin())
    num_batches = 0
    while not elastic.pool.report().restarts:
        num_batches += 1
        batch = await elastic.ask(requests(2, 1))
        elastic.now += 20
        elastic[1].answer(1)
        await settle()
        elastic.now += 80
        await asyncio.sleep(0.15)  # a look at it comes every 0.1 s
        await elastic.answer_all()
        await asyncio.wait_for(batch, 5)
        assert len(elastic.done) == 2 * num_batches
        assert num_batches < 10
    assert num_batches > 1
    assert elastic[0] is not hanging
