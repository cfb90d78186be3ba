"""THE loop over fake roles, ended and begun again: it goes on as if it had not been."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from harness import Harness, make_config

from rlhf_ray.driver.checkpoint import Checkpoints
from rlhf_ray.engines.fake import FakeEngine
from rlhf_ray.errors import ActorFailure


@pytest.mark.parametrize("stop_after", [2, 3, 5])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(stop_after: int, tmp_path: Path) -> None:
    whole = Harness(make_config(tmp_path / "whole"))
    expected = whole.run()
    # Ends in a failure, so iterations after the last save are done again.
    calls = 3 + 3 * stop_after + (1 if stop_after > 3 else 0)
    broken = Harness(make_config(tmp_path / "run"), [FakeEngine(fail_on_call=calls + 1)])
    with pytest.raises(ActorFailure):
        broken.run()
    assert len(broken.metrics()) == stop_after
    resumed = Harness(make_config(tmp_path / "run"))
    summary = resumed.run()
    first = resumed.events.index(("publish", stop_after // 2 * 2))
    assert resumed.events[first][1] == stop_after // 2 * 2
    assert resumed.metrics() == whole.metrics()
    assert resumed.records("eval") == whole.records("eval")
    assert resumed.records("completions") == whole.records("completions")
    assert _without_times(summary) == _without_times(expected)
    assert 0 < summary["effective_time_ratio"] < expected["effective_time_ratio"] == 1
    assert set(summary["seconds_lost"]) == {"driver: redone", "driver: down", "driver: start"}
    assert summary["restarts"] == expected["restarts"] | {"driver": 1}


def test_a_kill_before_the_commit_is_on_disk_leaves_each_iteration_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Harness(make_config(tmp_path / "whole"))
    whole.run()
    broken = Harness(make_config(tmp_path / "run"))
    save = broken.checkpoints.save

    def die_in_the_second(version: int, *args: Any) -> None:
        if version == 4:
            raise ActorFailure("killed")
        save(version, *args)

    monkeypatch.setattr(broken.checkpoints, "save", die_in_the_second)
    with pytest.raises(ActorFailure):
        broken.run()
    # Iteration 4 was recorded, and published, but not saved: it is done again. The commit after it
    # that is due, 6, waits for it, so at most iteration 5 was done meanwhile.
    assert [record["iteration"] for record in broken.metrics()] in ([1, 2, 3, 4], [1, 2, 3, 4, 5])
    resumed = Harness(make_config(tmp_path / "run"))
    resumed.run()
    assert resumed.metrics() == whole.metrics()
    assert resumed.records("completions") == whole.records("completions")


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tmp_path: Path) -> None:
    config = make_config(tmp_path / "whole", iterations=2, eval_every=2)
    whole = Harness(config)
    whole.run()
    # Proof 2, evaluation 1, iterations 6: the next call is the evaluation of version 2.
    config = make_config(tmp_path / "run", iterations=2, eval_every=2)
    broken = Harness(config, [FakeEngine(fail_on_call=10)])
    with pytest.raises(ActorFailure):
        broken.run()
    assert broken.saved() == [2]
    resumed = Harness(config)
    resumed.run()
    assert resumed.records("eval") == whole.records("eval")
    assert (tmp_path / "run" / "checkpoints" / "best").exists() == (
        tmp_path / "whole" / "checkpoints" / "best"
    ).exists()


def test_more_iterations_go_on_from_the_end(tmp_path: Path) -> None:
    whole = Harness(make_config(tmp_path / "whole"))
    whole.run()
    Harness(make_config(tmp_path / "run", iterations=4)).run()
    longer = Harness(make_config(tmp_path / "run", iterations=6))
    longer.run()
    assert longer.metrics() == whole.metrics()
    assert [event for event in longer.events if event[0] == "commit"] == [
        ("commit", 4),  # what a rollback of its first iteration would restore
        ("commit", 5),
        ("commit", 6),
    ]


def test_a_commit_that_was_saved_stays_whole_while_best_is_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill at any moment must leave the version: it is never removed to be written again."""
    removed: list[str] = []
    original = shutil.rmtree

    def spy(path: Any, *args: Any, **kwargs: Any) -> None:
        if (Path(path) / "state.json").is_file():
            removed.append(Path(path).name)
        original(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", spy)
    Harness(make_config(tmp_path, iterations=2, save_every=1, eval_every=1)).run()
    assert removed == []


def test_an_iteration_is_recorded_before_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill right after a save must not leave a gap in the metrics of the run that goes on."""
    harness = Harness(make_config(tmp_path, save_every=1, iterations=3, eval_every=100))
    seen: list[tuple[int, int]] = []
    original = Checkpoints.save

    def spy(self: Checkpoints, version: int, *args: Any) -> None:
        seen.append((version, len(harness.metrics())))
        original(self, version, *args)

    monkeypatch.setattr(Checkpoints, "save", spy)
    harness.run()
    assert seen == [(1, 1), (2, 2), (3, 3)]


def _without_times(summary: dict[str, Any]) -> dict[str, Any]:
    times = (
        "seconds",
        "seconds_lost",
        "seconds_useful",
        "episodes_per_s",
        "effective_time_ratio",
        "restarts",
    )
    return {k: v for k, v in summary.items() if k not in times}


def test_a_changed_kl_coefficient_replaces_the_adapted_one(tmp_path: Path) -> None:
    Harness(make_config(tmp_path, iterations=3)).run()
    # The same coefficient again, then another one: the controller continues, then begins there.
    Harness(make_config(tmp_path, iterations=4)).run()
    Harness(make_config(tmp_path, iterations=5, kl_coef=0.9)).run()
    Harness(make_config(tmp_path, iterations=6, kl_coef=0.9)).run()
    last = Harness(make_config(tmp_path, iterations=7, kl_coef=0.4, kl_target=None))
    last.run()
    coefs = [record["objective/kl_coef"] for record in last.metrics()]
    assert coefs[0] == 0.2
    assert 0.2 not in coefs[1:4]
    assert coefs[4] == 0.9
    assert coefs[5] == pytest.approx(0.9, rel=0.03)
    assert coefs[5] != 0.9, "it has adapted meanwhile"
    assert coefs[6] == 0.4
