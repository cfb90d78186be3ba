"""Whole PPO loops over fakes whose object store loses a batch's data: it is sampled again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness as harness_module
import pytest
from fakes import FakeScorer
from harness import Harness, ledger, make_config
from test_elastic_generators import assert_same

from rlhf_ray.errors import DataLost
from rlhf_ray.types import RawScores, Shard

LOST = DataLost(
    "What policy-0 needed for assemble was lost: spilling failed. Run again: the run re"
)


def losing(harness: Harness, group: str, method: str, at: int, times: int) -> Harness:
    """The calls from number ``at`` on of a learner's method lack their data so many times."""
    learner = getattr(harness, group)
    work: Callable[..., Any] = getattr(learner, method)
    calls = iter(range(10**6))

    async def fails(*args: Any) -> Any:
        if at <= next(calls) < at + times:
            raise LOST
        return await work(*args)

    setattr(learner, method, fails)
    return harness


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Harness:
    harness = Harness(make_config(tmp_path_factory.mktemp("undisturbed")))
    harness.run()
    return harness


@pytest.mark.parametrize(
    ("group", "method", "at", "times"),
    [
        ("policy", "logprobs", 4, 1),
        ("critic", "values", 0, 1),
        ("policy", "assemble", 0, 2),
        ("critic", "assemble", 3, 1),
        ("policy", "learn", 5, 1),
        ("critic", "learn", 2, 2),
    ],
)
def test_a_batch_whose_data_is_lost_is_sampled_again_and_the_same_is_learnt(
    tmp_path: Path,
    undisturbed: Harness,
    capsys: pytest.CaptureFixture[str],
    group: str,
    method: str,
    at: int,
    times: int,
) -> None:
    harness = losing(Harness(make_config(tmp_path)), group, method, at, times)
    summary = harness.run()
    for records in ("completions", "eval"):
        assert harness.records(records) == undisturbed.records(records)
    assert harness.metrics() == undisturbed.metrics()
    for file in ("policy/learner", "critic/value"):
        path = Path("checkpoints", "6", file)
        assert (harness.folder / path).read_bytes() == (undisturbed.folder / path).read_bytes()
    assert summary["guards"]["data_lost"] == times
    assert summary["samples_requeued"] == 8 * times
    assert summary["ledger"] == ledger(48)
    assert "driver: data lost" in summary["seconds_lost"]
    said = capsys.readouterr().out
    assert "spilling failed. It is sampled again under the same seeds; the run ends if" in said
    assert "Run again" not in said


def test_data_that_is_lost_again_and_again_ends_the_run(tmp_path: Path) -> None:
    harness = losing(Harness(make_config(tmp_path)), "policy", "assemble", 3, 3)
    with pytest.raises(DataLost, match="Run again"):
        harness.run()
    assert harness.saved() == [2, 3], "the last commit is saved"


class Forgets(FakeScorer):
    """Lacks the data of an evaluation once."""

    has_lost = False

    async def score(self, shard: Shard) -> RawScores:
        if not self.has_lost and shard.rollouts[0].prompt.id in ("p8", "p9"):
            self.has_lost = True
            raise LOST
        return await super().score(shard)


def test_an_evaluation_whose_data_is_lost_is_made_again(
    tmp_path: Path, undisturbed: Harness
) -> None:
    harness = Harness(make_config(tmp_path), scorer=Forgets)
    summary = harness.run()
    assert_same(harness, undisturbed)
    assert summary["guards"]["data_lost"] == 1
    assert summary["samples_requeued"] == 0


def test_texts_that_are_lost_after_the_commit_are_left_out(
    tmp_path: Path, undisturbed: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fetch(handle: Any) -> Any:
        if isinstance(handle, list) and handle[0].prompt.id not in ("p8", "p9"):
            raise LOST
        return handle

    monkeypatch.setattr(harness_module, "_fetch", fetch)
    harness = Harness(make_config(tmp_path))
    harness.run()
    assert harness.metrics() == undisturbed.metrics()
    assert harness.records("completions") == []
