"""THE loop where prompts whose responses all score the same are replaced by the next ones."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from fakes import FakePolicy, FakeScorer
from harness import PROMPTS, Harness, ledger, make_config, stop_at_third
from test_lost_data import losing
from test_resumed_loop import _without_times

from rlhf_ray.driver.batches import PromptCursor
from rlhf_ray.driver.ledger import Draw, Ledger
from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.errors import ActorFailure
from rlhf_ray.types import RawScores, Shard


def ids(*numbers: int) -> set[str]:
    """Prompts by their numbers in the run's sequence: eight prompts, then another order."""
    return {prompt.id for prompt in PromptCursor(PROMPTS[:8], 0).take(numbers)}


def scorer(equal: Collection[str]) -> type[FakeScorer]:
    """Scores the first of a prompt's responses near 0 and the other one near 1, or both 0.5."""

    class Fixed(FakeScorer):
        async def score(self, shard: Shard) -> RawScores:
            (even,) = (await super().score(shard)).values()
            scores = [
                0.5 if rollout.prompt.id in equal else rollout.position % 2 + 0.1 * share
                for rollout, share in zip(shard.rollouts, even, strict=True)
            ]
            return {"model": tuple(scores)}

    return Fixed


def filtering(
    folder: Path,
    equal: Collection[str],
    engine: FakeEngine | None = None,
    max_refills: int = 4,
    restarts: int = 0,
    **ppo: Any,
) -> Harness:
    keys: dict[str, Any] = {"filter_groups": {"max_refills": max_refills}, "advantage": "grpo"}
    config = make_config(folder, max_restarts=restarts, shard_size=2, **keys, **ppo)
    return Harness(config, [engine or FakeEngine()], scorer=scorer(equal))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[Draw]:
    """The batches in the order in which they were settled."""
    draws: list[Draw] = []
    settle = Ledger.settle

    def spy(self: Ledger, draw: Draw, *args: Any, **kwargs: Any) -> Any:
        draws.append(draw)
        return settle(self, draw, *args, **kwargs)

    monkeypatch.setattr(Ledger, "settle", spy)
    return draws


def learnt(harness: Harness) -> list[list[int]]:
    """Positions of each batch that the policy has learnt."""
    return [detail for what, detail in harness.events if what == "learn"]


def test_prompts_whose_responses_score_the_same_are_replaced_by_the_next(
    tmp_path: Path, settled: list[Draw]
) -> None:
    """Of prompts 0 to 3, 1 and 3 are; 4 and 5 take their place, of which 5 is as well; then 6."""
    harness = filtering(tmp_path, ids(1, 3, 5), iterations=1)
    summary = harness.run()
    assert learnt(harness) == [[0, 1, 4, 5, 8, 9, 12, 13]]
    (batch,) = settled
    assert batch.prompts == (0, 1, 2, 3, 4, 5, 6)
    assert batch.filtered == (2, 3, 6, 7, 10, 11)
    assert summary["ledger"] == ledger(8, filtered=6)
    assert (summary["samples_filtered"], summary["samples_generated"]) == (6, 14)
    (record,) = harness.metrics()
    found = {name: value for name, value in record.items() if name.startswith("filter/")}
    scores = found.pop("filter/scores")
    assert found == {
        "filter/prompts": 7,
        "filter/replaced": 3,
        "filter/equal_share": 3 / 7,
        "filter/refills": 2,
    }
    # Four prompts with a mean of their own, which were learnt, and three with a mean of .5.
    assert scores == pytest.approx((4 * record["objective/scores"] + 3 * 0.5) / 7)
    shards = [detail[1] for what, detail in harness.events if what == "generate"]
    assert [sorted(shards[-7:-3]), sorted(shards[-3:-1]), shards[-1]] == [[0, 1, 2, 3], [4, 5], 6]
    assert "filter_groups" not in summary["guards"]


def test_a_budget_that_is_used_up_learns_the_batch_as_it_is(
    tmp_path: Path, settled: list[Draw]
) -> None:
    harness = filtering(tmp_path, ids(1, 3, 5), max_refills=1, iterations=1)
    summary = harness.run()
    assert learnt(harness) == [[0, 1, 4, 5, 8, 9, 10, 11]]
    assert settled[0].filtered == (2, 3, 6, 7)
    assert summary["ledger"] == ledger(8, filtered=4)
    (record,) = harness.metrics()
    assert record["filter/equal_share"] == 3 / 6
    (warning,) = (r for r in harness.records("warnings") if r["guard"] == "filter_groups")
    assert warning["iteration"] == 1
    assert warning["numbers"] == {"prompts": 6, "equal": 1, "refills": 1}
    assert "whose 2 responses all score the same are left, 1 of 4; the batch" in warning["text"]


def test_without_a_filter_they_are_learnt_and_nothing_is_logged_of_it(tmp_path: Path) -> None:
    harness = filtering(tmp_path, ids(1, 3, 5), max_refills=0, iterations=1)
    assert harness.run()["ledger"] == ledger(8)
    assert not any(name.startswith("filter/") for name in harness.metrics()[0])


def test_where_nothing_is_equal_a_filter_changes_nothing(tmp_path: Path) -> None:
    on, off = (filtering(tmp_path / str(num), (), max_refills=num) for num in (4, 0))
    on.run()
    off.run()
    logged = [
        {name: value for name, value in record.items() if not name.startswith("filter/")}
        for record in on.metrics()
    ]
    assert logged == off.metrics()
    assert on.records("completions") == off.records("completions")


def test_a_filter_that_draws_more_prompts_than_there_are_warns_of_that(tmp_path: Path) -> None:
    harness = filtering(tmp_path, ids(1, 3, 5), iterations=2)
    harness.run()
    (warning,) = (r for r in harness.records("warnings") if r["guard"] == "prompt_reuse")
    assert warning["numbers"] == {"drawn": 11, "prompts": 8}


EQUAL = {"p0", "p3", "p5"}
"""Prompts whose responses always score the same: so every batch is refilled, once or more."""


@pytest.mark.parametrize("call", [8, 10, 15, 22])
def test_a_run_that_dies_while_it_refills_goes_on_as_if_it_had_not(
    tmp_path: Path, settled: list[Draw], call: int
) -> None:
    whole = filtering(tmp_path / "whole", EQUAL, save_every=1)
    expected = whole.run()
    assert len(settled) == 6
    numbers = [n for draw in settled for n in draw.prompts]
    assert numbers == [*range(len(numbers))]
    broken = filtering(tmp_path / "run", EQUAL, FakeEngine(fail_on_call=call), save_every=1)
    with pytest.raises(ActorFailure):
        broken.run()
    last = [detail for what, detail in broken.events if what == "generate"][-1]
    assert last[1] >= 4, "it died in a refill"
    resumed = filtering(tmp_path / "run", EQUAL, save_every=1)
    summary = resumed.run()
    assert resumed.metrics() == whole.metrics()
    assert resumed.records("completions") == whole.records("completions")
    assert resumed.records("eval") == whole.records("eval")
    assert _without_times(summary) == _without_times(expected)
    assert settled[6:] == settled[:6]


@pytest.mark.parametrize(("method", "at"), [("assemble", 1), ("logprobs", 9)])
def test_a_refilled_batch_whose_data_is_lost_is_sampled_and_refilled_alike(
    tmp_path: Path, settled: list[Draw], method: str, at: int
) -> None:
    whole = filtering(tmp_path / "whole", EQUAL)
    whole.run()
    harness = losing(filtering(tmp_path / "run", EQUAL), "policy", method, at, 1)
    summary = harness.run()
    assert summary["guards"]["data_lost"] == 1
    assert harness.metrics() == whole.metrics()
    assert settled[6:] == settled[:6]


def test_a_rolled_back_batch_counts_what_was_filtered_apart(tmp_path: Path) -> None:
    harness = filtering(tmp_path, EQUAL, iterations=5)
    learn = harness.policy.learn

    async def spike(*args: Any) -> Any:
        report = await learn(*args)
        if harness.policy.learnt == 2 and not spiked:
            spiked.append(True)
            report.metrics["loss/policy_avg"] = float("nan")
        return report

    spiked: list[bool] = []
    harness.policy.learn = spike  # type: ignore[method-assign]
    counts = harness.run()["ledger"]
    assert (counts["learnt"], counts["discarded"]) == (32, 8)
    assert counts == ledger(32, discarded=8, filtered=counts["filtered"])
    assert counts["filtered"] > 0


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_batches_ahead_are_refilled_by_the_prompts_behind_them(
    tmp_path: Path, settled: list[Draw], max_staleness: int
) -> None:
    keys = {"max_staleness": max_staleness, "importance_cap": 2.0}
    harness = filtering(tmp_path, EQUAL, **keys)
    summary = harness.run()
    numbers = [n for draw in settled for n in draw.prompts]
    assert sorted(numbers) == [*range(len(numbers))]
    assert numbers != sorted(numbers), "refills are drawn behind the batches ahead"
    assert summary["ledger"] == ledger(48, filtered=2 * len(numbers) - 48)
    assert max(r["rollout/staleness"] for r in harness.metrics()) == max_staleness
    assert all(len(positions) == 8 for positions in learnt(harness))
    # A refill is sampled with the current version, whatever the batch's own.
    for record in harness.metrics():
        if record["filter/refills"]:
            version = record["iteration"] - 1
            assert any(
                what == "generate" and detail[0] == version and detail[1] >= 4
                for what, detail in harness.events
            )


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 0), (0, 2)])
def test_a_run_that_was_stopped_repeats_and_loses_no_prompt(
    tmp_path: Path, settled: list[Draw], before: int, after: int
) -> None:
    """Those of the batches in flight, and those that others' refills were drawn behind."""
    policy = FakePolicy()
    first = filtering(
        tmp_path, EQUAL, max_staleness=before, importance_cap=2.0, iterations=7, save_every=1
    )
    first.policy = policy
    policy.events = first.events
    stop_at_third(first)
    counts = first.run()["ledger"]
    assert counts == ledger(24, filtered=counts["filtered"], in_flight=8 * before)
    assert len(settled) == 3
    again = filtering(
        tmp_path, EQUAL, max_staleness=after, importance_cap=2.0, iterations=7, save_every=1
    )
    counts = again.run()["ledger"]
    assert counts == ledger(56, filtered=counts["filtered"])
    numbers = [n for draw in settled for n in draw.prompts]
    assert sorted(numbers) == [*range(len(numbers))]
    assert counts["drawn"] == 2 * len(numbers)
