import time
from pathlib import Path

import pytest

from rlhf_ray.observability.outages import Outages


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


def test_a_later_process_of_the_run_counts_what_earlier_ones_reported(
    tmp_path: Path, clock: Clock
) -> None:
    first = Outages(tmp_path / "outages.jsonl")
    clock.now += 20
    first.restarted("policy", "died", 12.5)
    clock.now += 3
    first.lost("driver", "placement", 3.0)
    first.close()
    later = Outages(tmp_path / "outages.jsonl")
    clock.now += 1
    later.restarted("policy", "died", 0.5)
    later.restarted("generator", "deadline", 0.0)
    assert later.restarts == {"policy": 2, "generator": 1}
    assert later.lost_s == {"policy: died": 13.0, "driver: placement": 3.0}
    with (tmp_path / "outages.jsonl").open("a") as file:
        file.write('{"role": 3}\n{"time": 1.0, "role": "policy", "cause": "died", "rest')
    assert Outages(tmp_path / "outages.jsonl").restarts == later.restarts


def test_seconds_in_which_two_roles_were_out_count_once(clock: Clock) -> None:
    outages = Outages()
    clock.now = 110.0
    outages.restarted("policy", "died", 4.0)  # 106 to 110
    clock.now = 112.0
    outages.restarted("critic", "died", 8.0)  # 104 to 112: 104 to 106 and 110 to 112 are new
    clock.now = 120.0
    outages.lost("driver", "disk full", 1.0)
    assert outages.lost_s == {"policy: died": 4.0, "critic: died": 4.0, "driver: disk full": 1.0}
    assert outages.restarts == {"policy": 1, "critic": 1}
    clock.now = 130.0
    assert outages.lap() == 30.0 - 9.0


def test_what_an_earlier_lap_has_counted_is_not_lost_again(clock: Clock) -> None:
    outages = Outages()
    clock.now = 110.0
    assert outages.lap() == 10.0
    clock.now = 112.0
    outages.restarted("reward", "died", 5.0)
    assert outages.lost_s == {"reward: died": 2.0}
    assert outages.lap() == 0.0
