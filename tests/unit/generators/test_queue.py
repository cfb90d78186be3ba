"""Who has which shard: each is with one generator at a time, and is done once."""

import pytest

from rlhf_ray.generators.queue import ShardQueue
from rlhf_ray.types import Prompt, SampleRequest, ShardRequest


def request(index: int, *prompt_lengths: int) -> ShardRequest:
    """A shard with prompts of given lengths."""
    samples = tuple(
        SampleRequest(10 * index + i, Prompt(str(i), "", (1,) * length), 0)
        for i, length in enumerate(prompt_lengths)
    )
    return ShardRequest(index, samples, 0)


def test_the_longest_prompts_go_first() -> None:
    queue = ShardQueue([request(0, 2, 2), request(1, 9), request(2, 1, 4)])
    assert [queue.take("a").index for _ in range(3)] == [1, 2, 0]
    assert len(queue) == 0


def test_what_is_handed_back_waits_at_its_place_again() -> None:
    queue = ShardQueue([request(0, 3, 3), request(1, 5), request(2, 4), request(3, 1)])
    first, second = queue.take("a"), queue.take("b")
    assert (first.index, second.index) == (0, 1)
    assert queue.hand_back("a") == 2  # samples
    assert queue.hand_back("a") == 0
    assert [queue.take("b").index for _ in range(3)] == [0, 2, 3]


def test_an_answer_counts_as_long_as_the_shard_is_held() -> None:
    queue = ShardQueue([request(0, 1)])
    taken = queue.take("a")
    assert queue.holds("a", taken)
    queue.hand_back("a")
    assert not queue.holds("a", taken)
    again = queue.take("b")
    assert again == taken
    assert not queue.holds("a", again)
    queue.finish("b", again)
    assert not queue.holds("b", again)
    with pytest.raises(KeyError):
        queue.finish("b", again)
