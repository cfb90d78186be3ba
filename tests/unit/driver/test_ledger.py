import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from rlhf_ray.driver.checkpoint import RunState
from rlhf_ray.driver.ledger import Draw, Ledger
from rlhf_ray.errors import LedgerError
from rlhf_ray.types import ShardInfo, StepReport

PROMPTS, SAMPLES = 2, 4
"""Of a batch: two samples of each prompt."""


def draw(ledger: Ledger, version: int) -> Draw:
    return ledger.draw(PROMPTS, SAMPLES, version)


def shard(index: int, positions: tuple[int, ...], version: int = 0) -> ShardInfo:
    num = len(positions)
    return ShardInfo(index, positions, (1,) * num, (True,) * num, (version,) * num)


def report(*positions: int) -> StepReport:
    return StepReport({}, positions, 1)


def test_every_position_of_every_batch_is_accounted_for_while_several_are_in_flight() -> None:
    """As with a staleness of two: three batches are drawn before the first is learnt."""
    ledger, state = Ledger(RunState()), RunState()
    drawn = [draw(ledger, version) for version in (0, 0, 0)]
    for version in range(1, 20):
        batch = drawn.pop(0)
        ledger.arrived(batch, [shard(1, (3, 2), batch.version), shard(0, (0, 1), batch.version)])
        ledger.learnt(batch, {"policy": report(0, 2, 1, 3), "critic": report(3, 2, 1, 0)})
        is_learnt = version != 4
        settled = ledger.settle(batch, version, is_learnt=is_learnt)
        state = replace(state, iteration=batch.batch, version=version, **settled)
        assert ledger.counts() == {
            "drawn": SAMPLES * (version + 2),
            "learnt": SAMPLES * (version - (version >= 4)),
            "discarded": SAMPLES * (version >= 4),
            "filtered": 0,
            "in_flight": 2 * SAMPLES,
        }
        drawn.append(draw(ledger, version))
    assert [batch.batch for batch in drawn] == [20, 21, 22]
    assert [batch.prompts for batch in drawn] == [(38, 39), (40, 41), (42, 43)]
    assert (state.prompts_drawn, state.samples_drawn, len(state.in_flight)) == (38, 84, 2)

    resumed = Ledger(state)
    counts = {"drawn": 76, "learnt": 72, "discarded": 4, "filtered": 0, "in_flight": 0}
    assert resumed.counts() == counts
    # What was in flight is drawn again at the same positions, from the version that there is.
    again = [draw(resumed, 19) for _ in range(2)]
    assert [(b.batch, b.prompts) for b in again] == [(20, (38, 39)), (21, (40, 41))]


def test_a_commit_of_an_older_version_is_continued() -> None:
    older = RunState(
        iteration=3, version=3, prompts_drawn=6, samples_generated=12, samples_learnt=12
    )
    ledger = Ledger(older)
    batch = draw(ledger, 3)
    assert (batch.batch, batch.prompts) == (4, (6, 7))
    assert ledger.settle(batch, 4, is_learnt=True)["samples_drawn"] == 16


def test_filtered_positions_are_replaced_by_the_next_prompts() -> None:
    """Prompts 0 and 1 are drawn, 1 is filtered, then 2 that takes its place."""
    ledger = Ledger(RunState())
    batch = ledger.refill(draw(ledger, 0), (2, 3))
    assert batch.prompts == (0, 1, 2)
    batch = ledger.refill(batch, (5, 4))
    assert (batch.prompts, batch.filtered) == ((0, 1, 2, 3), (2, 3, 4, 5))
    ledger.arrived(batch, [shard(0, (0, 1)), shard(3, (6, 7))])
    ledger.learnt(batch, {"policy": report(0, 1, 6, 7)})
    with pytest.raises(LedgerError, match=r"learnt 3 of the 4 .* filtered: 2 \(prompt 1 of"):
        ledger.learnt(batch, {"policy": report(0, 1, 2)})
    settled = ledger.settle(batch, 1, is_learnt=True)
    assert ledger.counts() == {
        "drawn": 8,
        "learnt": 4,
        "discarded": 0,
        "filtered": 4,
        "in_flight": 0,
    }
    assert (settled["prompts_drawn"], settled["samples_generated"]) == (4, 8)
    assert draw(Ledger(replace(RunState(), iteration=1, version=1, **settled)), 1).prompts == (4, 5)


def test_a_batch_that_is_sampled_again_gets_the_same_prompts_for_its_refills() -> None:
    ledger = Ledger(RunState())
    batch, other = draw(ledger, 0), draw(ledger, 0)
    refilled = ledger.refill(batch, (0, 1, 2, 3))
    assert refilled.prompts == (0, 1, 4, 5)
    again = ledger.empty(refilled)
    assert again == batch
    assert ledger.counts()["drawn"] == 8
    # This time one prompt is filtered: what is left is the next batch's.
    assert ledger.refill(again, (0, 1)).prompts == (0, 1, 4)
    assert draw(ledger, 0).prompts == (5, 6)
    assert other.prompts == (2, 3)


@pytest.mark.parametrize("as_saved", [False, True])
def test_prompts_in_flight_are_drawn_again_whatever_was_drawn_behind_them(as_saved: bool) -> None:
    """The refill of batch 1 is drawn after batches 2 and 3, and settled before them."""
    ledger = Ledger(RunState())
    batch, _, _ = draw(ledger, 0), draw(ledger, 0), draw(ledger, 0)
    batch = ledger.refill(batch, (0, 1))
    assert batch.prompts == (0, 1, 6)
    state = RunState(iteration=1, version=1, **ledger.settle(batch, 1, is_learnt=True))
    seen = [*batch.prompts]
    # Each iteration in a process of its own, which draws no batch ahead.
    for version in range(2, 6):
        progress = json.loads(json.dumps(asdict(state))) if as_saved else asdict(state)
        ledger = Ledger(RunState(**progress))
        batch = draw(ledger, version - 1)
        seen += batch.prompts
        settled = ledger.settle(batch, version, is_learnt=True)
        state = RunState(iteration=version, version=version, **settled)
    assert seen == [0, 1, 6, 2, 3, 4, 5, 7, 8, 9, 10]


def test_a_commit_from_before_refills_is_continued() -> None:
    older = {"batch": 2, "first_prompt": 2, "num_prompts": 2, "num_samples": 4, "version": 0}
    state = RunState(
        iteration=1,
        version=1,
        prompts_drawn=2,
        in_flight=[older],
        samples_drawn=8,
        samples_generated=4,
        samples_learnt=4,
    )
    ledger = Ledger(state)
    assert [draw(ledger, 1).prompts for _ in range(2)] == [(2, 3), (4, 5)]
    assert ledger.counts()["drawn"] == 12


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([(0, 1), (2,)], r"Batch 1: missing: 3 \(prompt 1 of the run, sample 1\)$"),
        ([(0, 1), (2, 3), (0, 1)], r"Batch 1: more than once: 0 \(prompt 0 .* sample 0\), 1 \("),
        ([(0, 1), (2, 3, 4)], r"Batch 1: never drawn: 4$"),
        ([(0, 1), (0, 1)], r"4 samples \(2 distinct\) where 4 .* missing: 2 .* more than once: 0"),
    ],
)
def test_a_batch_that_did_not_arrive_once_names_its_positions(
    shards: list[tuple[int, ...]], message: str
) -> None:
    ledger = Ledger(RunState())
    batch = draw(ledger, 0)
    with pytest.raises(LedgerError, match=message):
        ledger.arrived(batch, [shard(i, positions) for i, positions in enumerate(shards)])


def test_samples_of_another_version_than_requested_are_named() -> None:
    ledger = Ledger(RunState(version=5))
    batch = draw(ledger, 5)
    with pytest.raises(LedgerError, match=r"versions \[4, 6\], 5 is .* stale: 1 \(.*, 2 \("):
        ledger.arrived(
            batch, [shard(0, (0,), 5), shard(1, (1,), 4), shard(2, (2,), 6), shard(3, (3,), 5)]
        )


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ((0, 1, 3), r"The critic learnt 3 of the 4 samples .* missing: 2 \("),
        ((0, 1, 1, 3), r"missing: 2 \(.*more than once: 1 \("),
        ((0, 1, 2, 3, 3), r"learnt 5 of the 4 samples .* more than once: 3 \("),
    ],
)
def test_a_group_that_learns_a_position_twice_or_never_is_named(
    positions: tuple[int, ...], message: str
) -> None:
    ledger = Ledger(RunState())
    batch = draw(ledger, 0)
    with pytest.raises(LedgerError, match=message):
        ledger.learnt(batch, {"policy": report(0, 1, 2, 3), "critic": report(*positions)})


def test_of_many_positions_the_first_are_named() -> None:
    ledger = Ledger(RunState())
    batch = ledger.draw(100, 400, 0)
    with pytest.raises(LedgerError, match=r"7 \(prompt 1 of the run, sample 3\) and 392 more"):
        ledger.arrived(batch, [])


def settle_twice(ledger: Ledger) -> None:
    first = draw(ledger, 0)
    ledger.settle(first, 1, is_learnt=True)
    ledger.settle(first, 2, is_learnt=False)


def settle_out_of_order(ledger: Ledger) -> None:
    draw(ledger, 0)
    ledger.settle(draw(ledger, 0), 1, is_learnt=True)


def commit_a_version_twice(ledger: Ledger) -> None:
    ledger.settle(draw(ledger, 0), 1, is_learnt=True)
    ledger.settle(draw(ledger, 1), 1, is_learnt=True)


def sample_from_an_older_version(ledger: Ledger) -> None:
    ledger.settle(draw(ledger, 1), 1, is_learnt=True)
    draw(ledger, 0)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (settle_twice, r"Batch 1, positions 0 to 3 .* to be discarded; .* in flight is none"),
        (settle_out_of_order, r"Batch 2, positions 0 to 3 \(prompts 2 to 3 .*in flight is 1$"),
        (commit_a_version_twice, r"Batch 2, .* ends in version 1, but version 1 was committed"),
        (sample_from_an_older_version, r"Batch 2, .* version 0, but the batch before it from 1"),
    ],
)
def test_batches_are_settled_once_in_order_under_growing_versions(
    action: Any, message: str
) -> None:
    with pytest.raises(LedgerError, match=message):
        action(Ledger(RunState()))


def test_a_commit_whose_counts_do_not_add_up_is_refused() -> None:
    """Such as one that an older version wrote after it had lost a sample."""
    broken = RunState(iteration=2, version=2, samples_generated=8, samples_learnt=7)
    ledger = Ledger(broken)
    batch = draw(ledger, 2)
    with pytest.raises(LedgerError, match=r"12 samples were drawn, but 11 learnt, 0 discarded"):
        ledger.settle(batch, 3, is_learnt=True)
