"""Tests of the pool: distribution of prompts, and generators that join and leave."""

import asyncio

import pytest
from elastic import Elastic, requests, settle, update
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config.rollout import AutoscaleConfig
from rlhf_ray.errors import ConfigError, PlacementError, WeightSyncError

WRONG = WeightSyncError("it serves something else")


class TestHandingOut:
    async def test_longest_prompts_go_first_to_the_least_loaded(self) -> None:
        elastic = Elastic(2)
        await elastic.begin(2, 9, 5, 7, 1, 1)
        assert elastic[0].begun == [1, 2]  # 9 and 5
        assert elastic[1].begun == [3, 0]  # 7 and 2
        elastic[1].answer(3)
        await settle()
        assert elastic[1].begun == [3, 0, 5]

    @pytest.mark.parametrize("max_in_flight", [1, 3])
    async def test_no_generator_gets_more_than_its_share_at_a_time(
        self, max_in_flight: int
    ) -> None:
        elastic = Elastic(1, max_in_flight)
        await elastic.begin(*[1] * 7)
        assert len(elastic[0].holds) == max_in_flight
        elastic[0].answer(elastic[0].holds[0])
        await settle()
        assert len(elastic[0].holds) == max_in_flight

    async def test_a_slow_generator_holds_up_no_more_than_it_has_begun(self) -> None:
        elastic = Elastic(2, max_in_flight=1)
        batch = await elastic.begin(*[3] * 8)
        while elastic[1].holds:
            elastic[1].answer(elastic[1].holds[0])
            await settle()
        assert len(elastic.done) == 7
        assert not batch.done()
        elastic[0].answer(elastic[0].holds[0])
        await batch
        assert sorted(index for index, _ in elastic.done) == list(range(8))

    async def test_shards_are_yielded_as_they_are_done(self) -> None:
        elastic = Elastic(2, max_in_flight=1)
        await elastic.begin(1, 1)
        elastic[1].answer(0)
        await settle()
        assert elastic.done == [(0, "generator-1")]

    async def test_no_request_is_no_shard(self) -> None:
        await (await Elastic(1).begin())

    async def test_an_error_that_is_no_death_surfaces_and_ends_the_calls(self) -> None:
        elastic = Elastic(2, max_in_flight=1)
        batch = await elastic.begin(1, 1, 1)
        elastic[0].die(WRONG)
        with pytest.raises(WeightSyncError, match="something else"):
            await batch
        assert elastic[1].holds == []


class TestJoining:
    async def test_a_joining_generator_proves_and_serves_before_it_gets_prompts(self) -> None:
        elastic = Elastic(1, max_in_flight=1)
        batch = await elastic.begin(1, 1, 1)
        gates = elastic.processes.gates
        steps = [(what, "generator-1") for what in ("start", "prove", "publish 0")]
        gates |= {step: asyncio.Event() for step in steps}
        elastic.pool.scale_to(2)
        for step, state in zip(steps, ("starting", "stale", "stale"), strict=True):
            await settle()
            assert elastic.processes.log[-1] == step
            assert elastic.states()["generator-1"] == state
            gates[step].set()
        await settle()
        assert elastic.states() == {"generator-0": "ready", "generator-1": "ready"}
        assert elastic[1].begun == [1]  # the longest that waited, at once
        await elastic.answer_all()
        await batch

    async def test_one_that_joins_during_a_publication_serves_the_newer_version(self) -> None:
        elastic = Elastic(1)
        await (await elastic.begin())
        gate = elastic.processes.gates["publish 0", "generator-1"] = asyncio.Event()
        elastic.pool.scale_to(2)
        await settle()
        await elastic.pool.publish(update(1))  # waits for nobody who is being started
        gate.set()
        await settle()
        assert [what for what, who in elastic.processes.log if who == "generator-1"] == [
            "start",
            "prove",
            "publish 0",
            "publish 1",
        ]
        assert [status.version for status in elastic.pool.statuses()] == [1, 1]

    async def test_a_generator_that_fails_its_proof_gets_no_prompt_and_is_told_of(self) -> None:
        elastic = Elastic(1, max_in_flight=1, max_restarts=0)
        batch = await elastic.begin(1, 1, 1)
        elastic.processes.faults["prove", "generator-1"] = [WRONG]
        elastic.pool.scale_to(2)
        await elastic.answer_all()
        await batch
        assert elastic[1].begun == []
        assert elastic.processes.ended == ["generator-1"]
        assert "generator-1 is out of use: it serves something else" in elastic.told
        assert elastic.states() == {"generator-0": "ready", "generator-1": "dead"}

    async def test_want_of_room_uses_up_no_restart(self) -> None:
        elastic = Elastic(1, max_restarts=0)
        await (await elastic.begin())
        elastic.processes.faults["start", "generator-1"] = [PlacementError("no room")] * 4
        elastic.pool.scale_to(2)
        for _ in range(10):
            await settle()
        assert elastic.states() == {"generator-0": "ready", "generator-1": "ready"}
        assert elastic.pool.report().restarts == 0

    @pytest.mark.parametrize("turns", range(6))
    async def test_adapters_side_by_side_leave_running_shards_alone(self, turns: int) -> None:
        """Also one that is issued in the very moment of the publication."""
        elastic = Elastic(1, max_in_flight=2, waits_for_shards=False)
        await elastic.begin()
        batch = await elastic.ask(requests(3, 2, 1), or_newer=True)
        assert elastic[0].holds == [0, 1]
        elastic[0].answer(0)
        for _ in range(turns):
            await asyncio.sleep(0)
        await elastic.pool.publish(update(1))
        await settle()
        assert elastic[0].serves == 1
        assert elastic[0].holds == [1, 2]
        assert elastic.states() == {"generator-0": "ready"}
        await elastic.answer_all()
        await batch
        assert elastic[0].begun == [0, 1, 2]

    async def test_one_that_joins_before_anything_was_published_waits_for_it(self) -> None:
        elastic = Elastic(1)
        elastic.pool.scale_to(2)
        await settle()
        assert elastic.states() == {"generator-0": "starting", "generator-1": "stale"}
        await elastic.pool.prove(elastic.processes.prove)
        assert ("prove", "generator-1") in elastic.processes.log
        await elastic.pool.publish(update(0))
        assert elastic.states() == {"generator-0": "ready", "generator-1": "ready"}


class TestLeaving:
    async def test_a_leaving_generator_finishes_what_it_has_begun_and_gets_no_more(self) -> None:
        elastic = Elastic(2)
        batch = await elastic.begin(*[1] * 8)
        elastic.pool.scale_to(1)
        assert elastic.states()["generator-1"] == "retired"
        begun = elastic[1].holds
        for index in begun:
            elastic[1].answer(index)
        await settle()
        assert elastic[1].begun == begun[::-1]
        assert elastic.processes.ended == ["generator-1"]
        assert elastic.states() == {"generator-0": "ready"}
        await elastic.answer_all()
        await batch
        assert sorted(index for index, _ in elastic.done) == list(range(8))
        assert elastic.pool.report().samples_requeued == 0

    async def test_what_a_leaving_one_has_not_finished_in_time_is_handed_back(self) -> None:
        elastic = Elastic(2, drain_timeout_s=0.005)
        batch = await elastic.begin(*[1] * 4)
        elastic.pool.scale_to(1)
        assert len(elastic[1].holds) == 2
        await asyncio.sleep(0.03)
        assert elastic[1].holds == []
        assert elastic.states() == {"generator-0": "ready"}
        await elastic.answer_all()
        await batch
        assert sorted(elastic.done) == [(index, "generator-0") for index in range(4)]
        assert elastic.pool.report().samples_requeued == 2

    async def test_one_that_dies_while_it_leaves_hands_its_prompts_back(self) -> None:
        elastic = Elastic(2)
        batch = await elastic.begin(*[1] * 4)
        elastic.pool.scale_to(1)
        elastic[1].die()
        await elastic.answer_all()
        await batch
        assert sorted(elastic.done) == [(index, "generator-0") for index in range(4)]
        assert elastic.pool.report().restarts == 0

    async def test_those_go_first_who_do_nothing(self) -> None:
        elastic = Elastic(3)
        await elastic.begin(1, 1)
        elastic.processes.gates["start", "generator-3"] = asyncio.Event()
        elastic.pool.scale_to(4)
        await settle()
        elastic.pool.scale_to(3)
        await settle()
        assert list(elastic.states()) == ["generator-0", "generator-1", "generator-2"]
        elastic.pool.scale_to(2)
        await settle()
        assert list(elastic.states()) == ["generator-0", "generator-1"]
        assert elastic.processes.ended == ["generator-2"]

    async def test_a_run_keeps_one(self) -> None:
        with pytest.raises(ConfigError, match="at least one generator; 0 were requested"):
            Elastic(1).pool.scale_to(0)


class TestCounting:
    async def test_the_cluster_is_asked_for_room(self) -> None:
        elastic = Elastic(1)
        await (await elastic.begin())
        elastic.pool.scale_to(3)
        elastic.pool.scale_to(3)
        assert elastic.processes.room_for == [3]

    async def test_a_run_that_never_scales_asks_for_nothing(self) -> None:
        elastic = Elastic(1)
        await (await elastic.begin())
        await elastic.pool.close()
        assert elastic.processes.room_for == []

    async def test_the_load_decides_how_many_are_wanted(self) -> None:
        """The number changes only after two iterations with the same number of generators."""
        autoscale = AutoscaleConfig(minimum=1, maximum=4, iterations=2)
        elastic = Elastic(1, max_in_flight=1, autoscale=autoscale)
        batch = await elastic.begin(1)
        targets = []
        for version, (generation_s, rest_s) in enumerate([(9, 1)] * 4 + [(1, 9)] * 3, start=1):
            elastic.now += generation_s
            await elastic.answer_all()
            await batch
            elastic.now += rest_s
            await elastic.pool.publish(update(version))
            await settle()
            targets.append(elastic.pool.report().target)
            batch = await elastic.ask(requests(1, version=version))
        await elastic.answer_all()
        await batch
        assert targets == [1, 2, 2, 4, 4, 3, 3]
        idle = elastic.pool.report().idle
        assert idle.learners == pytest.approx(0.1)
        assert idle.generators == pytest.approx(1 - 1 / 30)  # one of three, for 1 of 10 s

    async def test_a_number_that_has_not_settled_is_not_looked_at(self) -> None:
        elastic = Elastic(1, autoscale=AutoscaleConfig(iterations=1))
        batch = await elastic.begin(1)
        elastic.processes.gates["start", "generator-1"] = asyncio.Event()
        for version in range(1, 4):
            elastic.now += 9
            await elastic.answer_all()
            await batch
            elastic.now += 1
            await elastic.pool.publish(update(version))
            assert elastic.pool.report().target == 2
            batch = await elastic.ask(requests(1, version=version))
        await elastic.pool.close()

    @pytest.mark.parametrize(("generation_s", "target"), [(9, 2), (1, 1)])
    async def test_one_that_finds_no_room_is_wanted_as_long_as_the_load_is(
        self, generation_s: float, target: int
    ) -> None:
        elastic = Elastic(1, autoscale=AutoscaleConfig(minimum=1, maximum=2, iterations=2))
        elastic.processes.faults["start", "generator-1"] = [PlacementError("no room")]
        batch = await elastic.begin(1)
        elastic.pool.scale_to(2)
        await settle()
        elastic.processes.gates["start", "generator-1"] = asyncio.Event()
        for version in range(1, 4):
            elastic.now += generation_s
            await elastic.answer_all()
            await batch
            elastic.now += 10 - generation_s
            await elastic.pool.publish(update(version))
            batch = await elastic.ask(requests(1, version=version))
        assert elastic.pool.report().target == target
        await elastic.pool.close()


@st.composite
def _steps(draw: st.DrawFn) -> list[tuple[str, int]]:
    kinds = st.sampled_from(
        ["answer", "die", "answer and die", "scale", "settle", "refuse", "straggle"]
    )
    return draw(st.lists(st.tuples(kinds, st.integers(0, 4)), max_size=30))


@settings(deadline=None, max_examples=60)
@given(
    num=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    max_in_flight=st.integers(1, 3),
    steps=_steps(),
)
def test_each_shard_comes_exactly_once_whatever_happens(
    num: int, lengths: list[int], max_in_flight: int, steps: list[tuple[str, int]]
) -> None:
    async def play() -> None:
        elastic = Elastic(num, max_in_flight, max_restarts=1000, drain_timeout_s=0.0)
        batch = await elastic.begin(*lengths)
        for what, which in steps:
            made = elastic.processes.started
            chosen = made[which % len(made)]
            if what == "answer" and chosen.holds:
                chosen.answer(chosen.holds[0])
            elif what == "die":
                chosen.die()
            elif what == "answer and die":
                chosen.answer_and_die()
            elif what == "scale":
                elastic.pool.scale_to(1 + which % 4)
            elif what == "refuse":
                elastic.processes.faults.setdefault(("prove", chosen.name), []).append(WRONG)
            elif what == "straggle":
                elastic.now += 100
                for running in elastic.pool._dispatch._batches:
                    elastic.pool._dispatch._issue_again(running, 2.0)
            elif what == "settle":
                await settle()
        await elastic.answer_all()
        await asyncio.wait_for(batch, 5)
        assert sorted(index for index, _ in elastic.done) == list(range(len(lengths)))
        await elastic.pool.close()

    asyncio.run(play())
