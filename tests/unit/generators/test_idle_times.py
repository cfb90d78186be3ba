"""Who waited for whom, on a clock that is moved by hand."""

import pytest

from rlhf_ray.generators.idle_times import IdleTimes
from rlhf_ray.types import IdleShares


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_shares_are_over_the_time_between_two_laps() -> None:
    clock = Clock()
    times = IdleTimes(clock)
    times.note(busy=2, serving=2, waiting=3)
    clock.now += 4  # 4 s: both sample, 3 shards wait
    times.note(busy=1, serving=2, waiting=0)
    clock.now += 2  # 2 s: one of two samples, none waits
    times.note(busy=0, serving=2, waiting=None)
    clock.now += 6  # 6 s: learners work
    # Generators: 24 s of two, busy for 8 + 2. Learners waited 6 of 12 s. Queue: (4 x 3) / 6.
    assert times.lap() == IdleShares(
        learners=pytest.approx(0.5),
        generators=pytest.approx(14 / 24),
        queue_depth=pytest.approx(2.0),
    )
    clock.now += 5
    assert times.lap() == IdleShares(learners=0.0, generators=1.0, queue_depth=0.0)


def test_no_time_is_no_share() -> None:
    assert IdleTimes(Clock()).lap() == IdleShares(0.0, 0.0, 0.0)
