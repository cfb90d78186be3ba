"""Tests of the shard queue and of idle times."""

import pytest

from rlhf_ray.generators.queue import IdleTimes, ShardQueue
from rlhf_ray.types import IdleShares, Prompt, SampleRequest, ShardRequest


def request(index: int, *prompt_lengths: int) -> ShardRequest:
    """Make a shard with prompts of given lengths."""
    samples = tuple(
        SampleRequest(10 * index + i, Prompt(str(i), "", (1,) * length), 0)
        for i, length in enumerate(prompt_lengths)
    )
    return ShardRequest(index, samples, 0)


def test_the_longest_prompts_go_first() -> None:
    queue = ShardQueue([request(0, 2, 2), request(1, 9), request(2, 1, 4)])
    assert [queue.take().index for _ in range(3)] == [1, 2, 0]
    assert len(queue) == 0


def test_what_is_put_back_waits_at_its_place_again() -> None:
    queue = ShardQueue([request(0, 3, 3), request(1, 5), request(2, 4), request(3, 1)])
    first, second = queue.take(), queue.take()
    assert (first.index, second.index) == (0, 1)
    queue.put_back([first])
    assert [queue.take().index for _ in range(3)] == [0, 2, 3]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_shares_are_over_the_time_between_two_laps() -> None:
    clock = Clock()
    times = IdleTimes(clock)
    times.note(busy=2, serving=2, waiting=3, is_awaited=True)
    clock.now += 4  # 4 s: both sample, 3 shards wait
    times.note(busy=1, serving=2, waiting=0, is_awaited=True)
    clock.now += 2  # 2 s: one of two samples, none waits
    times.note(busy=0, serving=2, waiting=0, is_awaited=False)
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
