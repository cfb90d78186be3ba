"""Tests of generators that die, hang or fail their proof: requeued prompts and restarts."""

import asyncio

import pytest
from elastic import Elastic, requests, settle, update

from rlhf_ray.errors import (
    ActorFailure,
    ConfigError,
    NodeLeaves,
    NodeLost,
    PlacementError,
    WeightSyncError,
)
from rlhf_ray.generators import member

DEAD, WRONG = ActorFailure("it died"), WeightSyncError("it serves something else")


async def test_the_prompts_of_a_dead_one_are_sampled_by_others_and_it_comes_back() -> None:
    elastic = Elastic(2)
    batch = await elastic.begin(*[1] * 4)
    elastic.processes.gates["start", "generator-1"] = asyncio.Event()
    dead = elastic[1]
    dead.die()
    await settle()
    assert elastic.states()["generator-1"] == "starting"
    assert elastic.processes.ended == ["generator-1"]
    await elastic.answer_all()
    await batch
    assert sorted(elastic.done) == [(index, "generator-0") for index in range(4)]
    elastic.processes.gates["start", "generator-1"].set()
    await settle()
    status = elastic.pool.statuses()[1]
    assert (status.state, status.version, status.restarts) == ("ready", 0, 1)
    assert elastic.processes.log[-3:] == [
        ("start", "generator-1"),
        ("prove", "generator-1"),
        ("publish 0", "generator-1"),
    ]
    report = elastic.pool.report()
    assert (report.restarts, report.samples_requeued) == (1, 2)
    assert elastic.outages.restarts == {"generator": 1}
    assert elastic.outages.lost_s == {}, "the other one went on"


async def test_an_answer_at_the_moment_of_death_is_dropped() -> None:
    """The failure of another call requeues its shard before the answer is read."""
    elastic = Elastic(2)
    batch = await elastic.begin(*[1] * 4)
    elastic[1].answer_and_die()
    await elastic.answer_all()
    await batch
    assert sorted(index for index, _ in elastic.done) == list(range(4))


async def test_the_only_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    elastic, lost = Elastic(1), list[object]()
    monkeypatch.setattr(elastic.outages, "lost", lambda *outage: lost.append(outage))
    batch = await elastic.begin(1, 1, 1)
    gate = elastic.processes.gates["start", "generator-0"] = asyncio.Event()
    elastic[0].die()
    await settle()
    elastic.now += 30
    gate.set()
    await elastic.answer_all()
    await batch
    assert sorted(index for index, _ in elastic.done) == [0, 1, 2]
    assert len(elastic.processes.started) == 2
    assert lost == [("generator", "none ready", 30.0)]


async def test_death_during_a_publication_leaves_the_others_and_starts_it_anew() -> None:
    elastic = Elastic(2)
    await (await elastic.begin())
    for error in (DEAD, WRONG):
        elastic.processes.faults["publish 1", "generator-1"] = [error]
        await elastic.pool.publish(update(1))
        assert elastic.states()["generator-0"] == "ready"
        await settle()
        assert [status.version for status in elastic.pool.statuses()] == [1, 1]
    assert elastic.pool.report().restarts == 2


async def test_a_move_from_a_node_that_leaves_costs_no_restart() -> None:
    elastic = Elastic(2, max_restarts=0)
    batch = await elastic.begin(*[1] * 4)
    elastic[1].die(NodeLeaves("its node leaves the cluster"))
    await elastic.answer_all()
    await batch
    await settle()
    assert elastic.states() == {"generator-0": "ready", "generator-1": "ready"}
    assert elastic.pool.report().restarts == 0
    assert elastic.outages.restarts == {"generator": 1}


async def test_where_none_serves_right_the_run_ends() -> None:
    elastic = Elastic(2)
    for number in range(2):
        elastic.processes.faults["prove", f"generator-{number}"] = [WRONG]
    with pytest.raises(WeightSyncError, match="it serves something else"):
        await elastic.pool.prove(elastic.processes.prove)
    assert elastic.pool.report().restarts == 0


async def test_a_batch_that_begins_after_a_failed_publication_ends_too() -> None:
    elastic = Elastic(2)
    batch = await elastic.begin(1)
    await elastic.answer_all()
    await batch
    for number in range(2):
        elastic.processes.faults["publish 1", f"generator-{number}"] = [WRONG]
    await elastic.pool.publish(update(1), beside=True)
    await settle()
    shards = elastic.pool.generate(requests(1, version=1))
    with pytest.raises(WeightSyncError, match="it serves something else"):
        await asyncio.wait_for(anext(shards), 5)


async def test_where_one_serves_right_the_run_goes_on() -> None:
    elastic = Elastic(2)
    elastic.processes.faults["prove", "generator-0"] = [WRONG]
    batch = await elastic.begin(1)
    await elastic.answer_all()
    await batch
    assert elastic.pool.report().restarts == 1


async def test_an_error_of_the_users_is_no_failure_of_a_generator() -> None:
    elastic = Elastic(2)
    elastic.processes.faults["prove", "generator-0"] = [ConfigError("not servable")]
    with pytest.raises(ConfigError, match="not servable"):
        await elastic.pool.prove(elastic.processes.prove)


async def test_without_restarts_left_the_others_do_the_work() -> None:
    elastic = Elastic(2, max_restarts=1)
    batch = await elastic.begin(*[1] * 6)
    elastic[1].die()
    await settle()
    elastic[1].die()
    await elastic.answer_all()
    await batch
    assert elastic.states() == {"generator-0": "ready", "generator-1": "dead"}
    assert sorted(index for index, _ in elastic.done) == list(range(6))


async def test_where_none_is_left_the_run_ends_and_says_why() -> None:
    elastic = Elastic(1, max_restarts=2)
    batch = await elastic.begin(1, 1)
    for _ in range(3):
        assert not batch.done()
        elastic[0].die()
        await settle()
    message = r"No generator is left, and 2 restarts \(generators.max_restarts\) .* died$"
    with pytest.raises(ActorFailure, match=message):
        await batch
    with pytest.raises(ActorFailure, match="No generator is left"):
        await elastic.pool.publish(update(1))
    with pytest.raises(ActorFailure, match="No generator is left"):
        await (await elastic.ask(requests(1)))


async def test_waits_double_until_a_shard_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def spy(seconds: float) -> None:
        if seconds:
            waits.append(seconds)
        await sleep(0)

    elastic = Elastic(1, max_restarts=20)
    elastic.pool._first_wait_s = 2.0
    batch = await elastic.begin(1, 1)
    monkeypatch.setattr("asyncio.sleep", spy)
    for _ in range(7):
        elastic[0].die()
        await settle()
    assert waits == [2, 4, 8, 16, 32, 60, 60]
    elastic[0].answer(0)
    await settle()
    elastic[0].die()
    await settle()
    assert waits[-1] == 2
    await elastic.answer_all()
    await batch


SLOW = ActorFailure("generator-0 did not answer start within 300 s")


async def test_a_first_start_that_fails_is_tried_again_within_the_budget() -> None:
    elastic = Elastic(1, max_restarts=2)
    elastic.processes.faults["start", "generator-0"] = [SLOW, SLOW]
    await elastic.pool.start()
    batch = await elastic.begin(1)
    await elastic.answer_all()
    await batch
    assert elastic.states() == {"generator-0": "ready"}
    assert elastic.pool.report().restarts == 2
    assert elastic.processes.ended == ["generator-0"], "the process that did not start"


async def test_a_run_begins_with_the_generators_that_have_started() -> None:
    elastic = Elastic(2)
    elastic.processes.faults["start", "generator-1"] = [SLOW]
    elastic.processes.gates["start", "generator-1"] = gate = asyncio.Event()
    starting = asyncio.ensure_future(elastic.pool.start())
    await settle()
    gate.set()
    await starting
    gate.clear()
    batch = await elastic.begin(1, 1)
    assert elastic.states() == {"generator-0": "ready", "generator-1": "starting"}
    await elastic.answer_all()
    await batch


async def test_a_run_whose_generators_never_start_ends_with_their_error() -> None:
    elastic = Elastic(2, max_restarts=3)
    for name in ("generator-0", "generator-1"):
        elastic.processes.faults["start", name] = [SLOW] * 9
    with pytest.raises(ActorFailure, match=r"3 restarts .* did not answer start within 300 s"):
        await elastic.pool.start()


async def test_a_start_that_no_restart_would_help_ends_the_run_at_once() -> None:
    elastic = Elastic(1)
    elastic.processes.faults["start", "generator-0"] = [ConfigError("no such model")]
    with pytest.raises(ConfigError, match="no such model"):
        await elastic.pool.start()


@pytest.mark.parametrize("what", ["prove", "publish 0"])
async def test_one_that_hangs_in_a_publication_or_a_proof_does_not_hold_up_the_others(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "LATE_S", 0.01)
    elastic = Elastic(2)
    elastic.processes.gates[what, "generator-1"] = gate = asyncio.Event()
    batch = await asyncio.wait_for(elastic.begin(*[1] * 6), 5)
    assert elastic.states() == {
        "generator-0": "ready",
        "generator-1": "starting" if what == "prove" else "stale",
    }
    assert "generator-1 is late; the run continues without it until it is done" in elastic.told
    gate.set()
    await settle()
    assert elastic.states()["generator-1"] == "ready"
    assert elastic[1].begun, "it takes a part of the work"
    await elastic.answer_all()
    await batch
    await elastic.pool.publish(update(1))
    assert [status.version for status in elastic.pool.statuses()] == [1, 1]


async def test_one_that_dies_while_it_is_late_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(member, "LATE_S", 0.01)
    elastic = Elastic(2)
    await (await elastic.begin())
    elastic.processes.gates["publish 1", "generator-1"] = gate = asyncio.Event()
    elastic.processes.faults["publish 1", "generator-1"] = [DEAD]
    await asyncio.wait_for(elastic.pool.publish(update(1)), 5)
    await elastic.pool.publish(update(2))
    gate.set()
    await settle()
    assert elastic.pool.report().restarts == 1
    assert [status.version for status in elastic.pool.statuses()] == [2, 2]


async def test_the_loss_of_a_node_costs_one_restart_whatever_it_took_along() -> None:
    elastic = Elastic(3, max_restarts=1)
    batch = await elastic.begin(*[1] * 3)
    for number in range(3):
        elastic[number].die(NodeLost(f"generator-{number} died with its node", "node-a"))
    await settle()
    await elastic.answer_all()
    await batch
    assert set(elastic.states().values()) == {"ready"}
    assert elastic.pool.report().restarts == 1
    assert elastic.outages.restarts == {"generator": 3}, "processes are told as they are"


@pytest.mark.parametrize("is_asked", [True, False])
async def test_where_the_only_node_of_generators_never_comes_back_the_run_ends(
    is_asked: bool,
) -> None:
    """Each waits for placement.timeout_s once; in a batch, or between two of them."""
    elastic = Elastic(2, max_restarts=1)
    batch = await elastic.begin(*[1] * 4)
    for number in range(2):
        refusals = [PlacementError("Waited 300 s for free GPUs (placement.timeout_s)")] * 99
        elastic.processes.faults["start", f"generator-{number}"] = [*refusals]
    if not is_asked:
        await elastic.answer_all()
        await batch
        lost = NodeLost("died with its node", "node-a")
        for number in range(2):
            elastic.processes.faults["publish 1", f"generator-{number}"] = [lost]
        batch = asyncio.ensure_future(elastic.pool.publish(update(1)))
        await asyncio.wait([batch])
        if batch.exception() is None:  # they are being placed
            await settle()
            batch = await elastic.ask(requests(1, version=1))
    else:
        for number in range(2):
            elastic[number].die(NodeLost("died with its node", "node-a"))
    message = (
        "No generator is left, and the cluster has no capacity for another; run again once it has: "
        "the run resumes at its last commit. The last failure: Waited 300 s"
    )
    with pytest.raises(ActorFailure, match=message):
        await asyncio.wait_for(batch, 5)
    assert elastic.pool.report().restarts == 1
    await elastic.pool.close()


class TestReplacement:
    """Of a generator whose samples were not the policy's."""

    async def test_it_is_proved_again_then_ended_and_comes_back(self) -> None:
        elastic = Elastic(2)
        await elastic.begin()
        elastic.pool.replace({"generator-1"}, WRONG)
        assert elastic.states() == {"generator-0": "ready", "generator-1": "stale"}
        await settle()
        assert elastic.processes.ended == ["generator-1"]
        assert elastic.processes.log[-4:] == [
            ("prove", "generator-1"),
            ("start", "generator-1"),
            ("prove", "generator-1"),
            ("publish 0", "generator-1"),
        ]
        assert elastic.states() == {"generator-0": "ready", "generator-1": "ready"}
        assert elastic.pool.report().restarts == 1
        assert any("else. The proof, made again, passed" in line for line in elastic.told)

    async def test_what_the_proof_finds_is_said(self) -> None:
        elastic = Elastic(2)
        await elastic.begin()
        elastic.processes.faults["prove", "generator-1"] = [WeightSyncError("it moves by 0")]
        elastic.pool.replace({"generator-1"}, WRONG)
        await settle()
        assert any("made again, failed: it moves by 0" in line for line in elastic.told)

    async def test_its_shards_go_to_others_before_the_proof(self) -> None:
        """A probe adapter is in its engine then: it must sample nothing that is learnt."""
        elastic = Elastic(2)
        batch = await elastic.begin(1, 1, 1, 1)
        gate = elastic.processes.gates["prove", "generator-1"] = asyncio.Event()
        elastic.pool.replace({"generator-1"}, WRONG)
        await settle()
        assert elastic[1].holds == []
        await elastic.answer_all()
        await batch
        assert sorted(elastic.done) == [(index, "generator-0") for index in range(4)]
        gate.set()
        await settle()
        assert elastic.states()["generator-1"] == "ready"

    async def test_without_restarts_left_the_others_go_on(self) -> None:
        elastic = Elastic(2, max_restarts=0)
        await elastic.begin()
        elastic.pool.replace({"generator-1"}, WRONG)
        await settle()
        assert elastic.states() == {"generator-0": "ready", "generator-1": "dead"}

    async def test_where_none_would_be_left_its_error_is_raised(self) -> None:
        elastic = Elastic(1, max_restarts=0)
        await elastic.begin()
        with pytest.raises(WeightSyncError, match="it serves something else"):
            elastic.pool.replace({"generator-0"}, WRONG)
        assert elastic.states() == {"generator-0": "ready"}

    async def test_one_that_has_left_is_nobody(self) -> None:
        elastic = Elastic(2)
        await elastic.begin()
        elastic.pool.scale_to(1)
        await settle()
        elastic.pool.replace({"generator-1"}, WRONG)
        assert elastic.states() == {"generator-0": "ready"}
