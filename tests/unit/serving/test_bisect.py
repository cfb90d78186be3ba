"""The first version with a property, among what a run logged or kept."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_ray import cli
from rlhf_ray.config import Config, resolve
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.observability.samples.writing import SampleWriter
from rlhf_ray.serving import bisect
from rlhf_ray.serving.measuring import search


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Config:
    """Ten iterations: responses repeat from version 6 on, the reward jumps in iteration 6."""
    rows = [
        {
            "iteration": number,
            "policy/version": number,
            "response/repeating_share": 0.05 if number <= 6 else 0.4,
            "objective/scores": 1.0 if number < 6 else 5.0,
            "objective/scores/length": float(number),
            "objective/kl": None if number == 2 else number / 2,
            "policy/approxkl_avg": number / 100,
        }
        for number in range(1, 11)
    ]
    write(tmp_path / "ppo" / "metrics.jsonl", rows)
    texts = [
        {
            "iteration": number,
            "position": n,
            "prompt": f"p{n}",
            "response": f"r{number}.{n}",
            "score": n,
        }
        for number in range(1, 11)
        for n in (0, 1, 2)
    ]
    SampleWriter(tmp_path / "ppo", [], -1).append(texts)
    write(tmp_path / "ppo" / "eval.jsonl", [{"iteration": 8, "version": 8, "eval/score": 2.5}])
    config = resolve({"run": {"dir": str(tmp_path)}})
    (tmp_path / "config.yaml").write_text("{}\n")
    for version in (3, 5, 9):
        (tmp_path / "checkpoints" / str(version) / "policy").mkdir(parents=True)
    return config


def test_a_logged_metric_of_rollouts_is_that_of_the_version_that_sampled_them(run: Config) -> None:
    find = bisect.run(run, "repetition > .1", num_rollouts=2)
    assert find.first == bisect.Value(version=6, value=0.4, iteration=7)
    assert find.before == bisect.Value(version=5, value=0.05, iteration=6)
    assert find.lesson is not None
    assert find.lesson.iteration == 6
    assert find.lesson.rewards["objective/scores"] == (1.0, 5.0)
    assert find.lesson.rewards["objective/scores/length"] == (5.0, 6.0)
    assert [row["response"] for row in find.lesson.rollouts] == ["r6.2", "r6.1"]
    assert find.lesson.num_kept == 3
    assert find.nearest == [5, 9]
    text = bisect.as_text(find, "runs/x")
    assert "response/repeating_share > 0.1 holds first for version 6: 0.4 (iteration 7)" in text
    assert "Iteration 6 taught it" in text
    assert "Version 6 is not kept; the nearest are compared here" in text
    assert text.endswith("Compare: rlhf-ray generate runs/x@5,9")


def test_a_metric_of_a_step_is_that_of_the_version_that_it_made(run: Config) -> None:
    find = bisect.run(run, "policy/approxkl_avg>=0.04")
    assert find.first == bisect.Value(version=4, value=0.04, iteration=4)
    held_out = bisect.run(run, "eval/score > 2").first
    assert held_out == bisect.Value(version=8, value=2.5, iteration=8)


def test_rollouts_ahead_of_learning_are_of_an_older_version(run: Config) -> None:
    path = Path(run.run.dir) / "ppo" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write(path, [row | {"rollout/staleness": 1 if row["iteration"] > 1 else 0} for row in rows])
    found = bisect.run(run, "repetition > .1").first
    assert found is not None
    assert found.version == 5


def test_no_rollouts_are_shown_only_where_none_are_recorded(run: Config) -> None:
    index = Path(run.run.dir) / "ppo" / "completions.index"
    index.write_bytes(b"damaged")
    with pytest.raises(DataError, match="is no index of samples"):
        bisect.run(run, "repetition > .1")
    index.unlink()
    lesson = bisect.run(run, "repetition > .1").lesson
    assert lesson is not None
    assert (lesson.rollouts, lesson.num_kept) == ([], 0)


def test_the_whole_batch_is_shown_where_it_is_kept(run: Config) -> None:
    path = Path(run.run.dir) / "ppo" / "batches" / "6" / "samples.jsonl"
    write(path, [{"prompt": "p", "response": f"b{n}", "score": n} for n in range(8)])
    lesson = bisect.run(run, "repetition > .1", num_rollouts=1).lesson
    assert lesson is not None
    assert (lesson.num_kept, lesson.rollouts[0]["response"]) == (8, "b7")


def test_nothing_taught_the_version_that_a_run_starts_from(run: Config) -> None:
    find = bisect.run(run, "kl < 1")
    assert find.first == bisect.Value(version=0, value=0.5, iteration=1)
    assert find.lesson is None
    assert "the run started from this version" in bisect.as_text(find, "x")


@pytest.mark.parametrize(("before", "says"), [(3, True), (5, False), (None, True)])
def test_what_is_measured_of_kept_versions_alone_may_hold_before(
    run: Config, before: int | None, says: bool
) -> None:
    find = bisect.run(run, "repetition > .1")
    measured = bisect.Value(6, 0.4, None)
    earlier = None if before is None else bisect.Value(before, 0.1, None)
    text = bisect.as_text(dataclasses.replace(find, first=measured, before=earlier), "x")
    assert (f"it may hold from version {(before or -1) + 1} on" in text) == says


def test_a_condition_that_never_holds_ends_with_one(run: Config) -> None:
    path = run.run.dir
    result = CliRunner().invoke(cli.app, ["bisect", path, "--when", "kl > 20"])
    assert result.exit_code == 1
    assert "holds for none of 9 values; the nearest is version 9: 5 (iteration 10)" in result.output
    result = CliRunner().invoke(cli.app, ["bisect", path, "--when", "kl > 2", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.output)["first"] == {"version": 4, "value": 2.5, "iteration": 5}


@pytest.mark.parametrize(
    "when", ["kl", "kl > ", "kl > x", "kl == 1", "kl > 1 and kl < 2", "> 1", "kl > nan"]
)
def test_a_condition_is_one_metric_a_comparison_and_a_number(run: Config, when: str) -> None:
    with pytest.raises(ConfigError, match="must be one metric, one of >= <= > < and a number"):
        bisect.run(run, when)


def test_what_cannot_be_looked_up_or_measured_is_refused(run: Config, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no metric that this run logged; did you mean object"):
        bisect.run(run, "objective/k > 1")
    with pytest.raises(DataError, match="has no iteration of PPO yet"):
        bisect.run(resolve({"run": {"dir": str(tmp_path / "new")}}), "kl > 1")


@pytest.mark.parametrize("first", range(1, 101))
def test_few_versions_are_asked(first: int) -> None:
    asked: set[int] = set()

    def holds(version: int) -> bool:
        asked.add(version)
        return version >= first

    search(range(1, 101), holds)
    assert {first, max(1, first - 1)} <= asked
    assert len(asked) <= 9


def test_where_it_holds_for_none_only_the_ends_are_asked() -> None:
    asked: list[int] = []
    search(range(1, 101), lambda version: bool(asked.append(version)))
    assert asked == [1, 100]
