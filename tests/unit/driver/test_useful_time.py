"""Each second of a run is useful, lost by a cause, or part of the first start or a pause."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.driver.checkpoint import RunState
from rlhf_ray.driver.useful_time import UsefulTime
from rlhf_ray.observability.outages import Outages


class Run:
    """Processes of a run, one after the other, on a clock of their own."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.state = RunState()
        self.path = folder / "outages.jsonl"
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def begin(self, start_s: float, seen_at: float = 0.0) -> None:
        self.outages = Outages(self.path)
        self.time = UsefulTime(self.outages, self.state, seen_at)
        self.now += start_s
        self.time.ready()

    def iterate(self, seconds: float, *, is_learnt: bool = True, is_saved: bool = True) -> None:
        self.now += seconds
        state = replace(self.state, **self.time.settle(self.now, is_learnt=is_learnt))
        if is_saved:
            self.state = state

    def account(self) -> dict[str, Any]:
        summary = self.time.summary(0)
        assert {r: n for r, n in summary.pop("restarts").items() if n} == self.outages.restarts
        assert summary.pop("seconds_useful") >= self.state.useful_s
        return summary


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


def test_a_run_without_faults_loses_nothing(run: Run) -> None:
    run.begin(60)
    run.iterate(10)
    run.iterate(12)
    run.now += 3  # the last publication, evaluation and save
    run.time.stopped()
    assert run.account() == {"effective_time_ratio": 1.0, "seconds_lost": {}}
    assert run.outages.restarts == {}


def test_a_crash_costs_what_is_redone_the_time_until_the_next_process_and_its_start(
    run: Run,
) -> None:
    run.begin(60)
    run.iterate(10)
    run.iterate(10, is_saved=False)  # ends at 1080 and is redone
    run.now = 1085.0
    died_at, run.now = run.now, 1100.0
    run.begin(20, seen_at=died_at)
    run.iterate(10)
    run.iterate(10)
    run.time.stopped()
    assert run.account() == {
        "effective_time_ratio": 30 / (30 + 15 + 15 + 20),
        "seconds_lost": {"driver: redone": 15.0, "driver: down": 15.0, "driver: start": 20.0},
    }
    assert run.outages.restarts == {"driver": 1}


def test_a_second_crash_before_the_next_commit_counts_no_second_twice(run: Run) -> None:
    run.begin(60)
    run.iterate(10)  # ends at 1070
    run.now = 1080.0
    run.begin(5, seen_at=1075.0)  # redone 5, down 5, start 5: until 1085
    run.now = 1090.0
    run.outages.restarted("policy", "died", 2.0)
    run.now = 1099.0
    run.begin(1, seen_at=1095.0)  # redone 10 - 2, down 4, start 1: until 1100
    run.iterate(10)
    assert run.account()["seconds_lost"] == {
        "driver: redone": 5.0 + 8.0,
        "driver: down": 5.0 + 4.0,
        "driver: start": 5.0 + 1.0,
        "policy: died": 2.0,
    }
    wall_s = run.now - 1060.0
    assert run.time.ratio == pytest.approx(20 / wall_s)
    assert run.outages.restarts == {"driver": 2, "policy": 1}


def test_a_crash_before_the_first_commit_is_counted(run: Run) -> None:
    run.begin(60)
    run.now = 1100.0
    run.begin(10, seen_at=1090.0)
    run.iterate(50)
    assert run.time.ratio == pytest.approx(50 / (run.now - 1060.0))


def test_a_pause_on_request_and_the_start_after_it_count_as_neither(run: Run) -> None:
    run.begin(60)
    run.iterate(10)
    run.now += 2
    run.time.stopped()
    run.now += 100_000
    run.begin(60, seen_at=1072.0)
    run.iterate(10)
    assert run.account() == {"effective_time_ratio": 1.0, "seconds_lost": {}}
    assert run.state.useful_s == 22.0


def test_an_older_commit_than_that_of_the_stop_costs_what_is_run_again(run: Run) -> None:
    """As where the last commit is damaged."""
    run.begin(60)
    run.iterate(10)
    run.iterate(10, is_saved=False)
    run.time.stopped()
    run.now += 5
    run.begin(5, seen_at=1080.0)
    assert run.account()["seconds_lost"] == {"driver: redone": 10.0}
    assert run.outages.restarts == {"driver": 1}


NIGHT_S = 40_000.0


@pytest.mark.parametrize("is_killed", [False, True], ids=["ends", "killed"])
def test_the_night_after_a_signal_costs_only_what_was_dropped(run: Run, is_killed: bool) -> None:
    run.begin(60)
    run.iterate(10)
    run.now += 4
    run.time.interrupted()
    if not is_killed:
        run.iterate(6)  # learning in hand, which is committed
        run.time.interrupted()
    run.now += NIGHT_S
    run.begin(60, seen_at=1080.0)
    run.iterate(10)
    dropped = {"driver: redone": 4.0} if is_killed else {}
    assert run.account()["seconds_lost"] == dropped
    assert run.state.useful_s == (20.0 if is_killed else 30.0)
    assert run.outages.restarts == {"driver": 1}


def test_a_signal_in_the_start_after_a_crash_leaves_the_cost_of_the_crash(run: Run) -> None:
    run.begin(60)
    run.iterate(10)  # ends at 1070
    run.now = 1090.0
    run.outages = Outages(run.path)
    run.time = UsefulTime(run.outages, run.state, 1080.0)
    run.now += 5
    run.time.interrupted()
    run.now += NIGHT_S
    run.begin(60, seen_at=1080.0)
    lost = {"driver: redone": 10.0, "driver: down": 10.0, "driver: start": 5.0}
    assert run.account()["seconds_lost"] == lost


def test_a_crash_that_nobody_sees_until_the_morning_costs_an_hour(run: Run) -> None:
    run.begin(60)
    run.iterate(10)
    run.now += NIGHT_S
    run.begin(20, seen_at=1075.0)
    lost = {"driver: redone": 5.0, "driver: down": 3600.0, "driver: start": 20.0}
    assert run.account()["seconds_lost"] == lost


def test_a_rolled_back_iteration_and_the_waits_of_a_learnt_one_are_lost(run: Run) -> None:
    run.begin(60)
    run.iterate(10)
    run.iterate(8, is_learnt=False)
    run.now += 5
    run.outages.restarted("critic", "died", 4.0)
    run.iterate(5)
    assert run.account() == {
        "effective_time_ratio": 16 / 28,
        "seconds_lost": {"driver: rolled back": 8.0, "critic: died": 4.0},
    }


def test_a_commit_of_an_older_version_counts_from_now_on(run: Run) -> None:
    run.state = RunState(iteration=5, version=5)
    run.begin(60, seen_at=900.0)
    run.iterate(10)
    assert run.account() == {"effective_time_ratio": 1.0, "seconds_lost": {}}


def test_a_clock_that_jumps_back_between_two_processes_loses_nothing_negative(run: Run) -> None:
    run.begin(60)
    run.iterate(10)
    run.now = 500.0
    run.begin(5, seen_at=1070.0)
    assert all(seconds >= 0 for seconds in run.account()["seconds_lost"].values())
    assert 0 < run.time.ratio < 1
