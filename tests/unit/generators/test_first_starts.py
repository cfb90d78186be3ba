"""Tests of the start of a run: it begins with the generators that are up."""

import asyncio

import pytest
from elastic import Elastic, settle

from rlhf_ray.errors import ActorFailure, ConfigError, PlacementError
from rlhf_ray.generators import first_starts, member

SLOW = ActorFailure("generator-0 did not answer start")


@pytest.fixture(autouse=True)
def _is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "LATE_S", 0.01)
    monkeypatch.setattr(first_starts, "LOOK_S", 0.005)


async def test_a_run_begins_while_a_late_generator_starts_and_it_joins_later() -> None:
    elastic = Elastic(3)
    gates = elastic.processes.gates
    gates["start", "generator-2"] = asyncio.Event()
    await asyncio.wait_for(elastic.pool.start(), 5)
    assert elastic.told == ["2 of 3 generators up"]
    batch = await elastic.begin(*[1] * 8)
    assert elastic.states()["generator-2"] == "starting"
    assert elastic[2].begun == []
    gates["start", "generator-2"].set()
    await settle()
    assert elastic.told[-1] == "generator-2 is up: 3 of 3 generators"
    assert [what for what, who in elastic.processes.log if who == "generator-2"] == [
        "start",
        "prove",
        "publish 0",
    ]
    assert elastic[2].begun, "it takes a part of the work"
    await elastic.answer_all()
    await batch


async def test_a_late_generator_that_fails_is_started_again() -> None:
    elastic = Elastic(2)
    elastic.processes.gates["start", "generator-1"] = gate = asyncio.Event()
    elastic.processes.faults["start", "generator-1"] = [RuntimeError("no CUDA device")]
    await elastic.pool.start()
    batch = await elastic.begin(1)
    gate.set()
    await settle()
    assert elastic.states() == {"generator-0": "ready", "generator-1": "ready"}
    assert elastic.pool.report().restarts == 1
    await elastic.answer_all()
    await batch


async def test_those_that_are_nearly_up_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(member, "LATE_S", 5.0)
    elastic = Elastic(2)
    elastic.processes.gates["start", "generator-1"] = gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, gate.set)
    await elastic.pool.start()
    assert elastic.told == ["1 of 2 generators up", "2 of 2 generators up"]


async def test_as_many_are_waited_for_as_the_config_says() -> None:
    elastic = Elastic(2, min_ready=2)
    elastic.processes.faults["start", "generator-1"] = [SLOW, SLOW]
    await elastic.pool.start()
    assert elastic.pool.report().restarts == 2
    assert elastic.told[-1] == "2 of 2 generators up"


async def test_a_run_that_cannot_have_as_many_as_it_needs_ends_and_says_so() -> None:
    elastic = Elastic(2, min_ready=2, max_restarts=1)
    elastic.processes.faults["start", "generator-1"] = [SLOW, SLOW]
    says = (
        r"Only 1 of the 2 generators that a run begins with \(generators\.min_ready\) are left, "
        r"and 1 restarts \(generators\.max_restarts\) are used up\. .* did not answer start"
    )
    with pytest.raises(ActorFailure, match=says):
        await elastic.pool.start()


async def test_where_the_cluster_has_no_capacity_for_any_the_run_ends() -> None:
    elastic = Elastic(1)
    batch = await elastic.begin(1)
    elastic.processes.faults["start", "generator-0"] = [PlacementError("no GPU is free")] * 9
    elastic[0].die()
    says = "No generator is left, and the cluster has no capacity for another.*no GPU is free"
    with pytest.raises(ActorFailure, match=says):
        await batch
    await elastic.pool.close()


def refuse(elastic: Elastic, *errors: Exception) -> None:
    for number, error in enumerate(errors):
        elastic.processes.faults["start", f"generator-{number}"] = [error]


async def test_what_all_engines_refuse_alike_ends_the_run_at_once() -> None:
    elastic = Elastic(2)
    refuse(elastic, *(ValueError(f"generator-{n}: no such dtype") for n in range(2)))
    with pytest.raises(ValueError, match="no such dtype"):
        await elastic.pool.start()
    assert elastic.pool.report().restarts == 0
    assert elastic.told == []


async def test_what_one_engine_refuses_is_tried_again() -> None:
    elastic = Elastic(2)
    refuse(elastic, ConfigError("this node has no such driver"))
    await elastic.pool.start()
    await (await elastic.begin())
    assert elastic.pool.report().restarts == 1
    assert set(elastic.states().values()) == {"ready"}


async def test_first_starts_that_fail_in_different_ways_are_tried_again() -> None:
    elastic = Elastic(2)
    refuse(elastic, ConfigError("no such driver"), OSError("no space left"))
    await elastic.pool.start()
    assert elastic.pool.report().restarts == 2


async def test_deaths_are_tried_again_though_all_first_starts_died() -> None:
    elastic = Elastic(2)
    refuse(elastic, *(ActorFailure("it died during start") for _ in range(2)))
    await elastic.pool.start()
    assert elastic.pool.report().restarts == 2
