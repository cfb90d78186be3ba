from itertools import chain

import pytest

from rlhf_ray.driver.batches import PromptCursor, derive_seed, sample_requests, shard_requests
from rlhf_ray.types import Prompt

PROMPTS = [Prompt(f"p{i}", f"prompt {i}", (i + 1,)) for i in range(5)]


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_seeds_are_of_31_bits_and_of_every_part() -> None:
    seeds = {derive_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
    # Literal, so that a change of the derivation, which changes every run, fails here.
    assert derive_seed(0, 1, 2) == 1599513701


def test_seeds_do_not_depend_on_the_sharding() -> None:
    samples = sample_requests(PROMPTS, 3, 7, 1)
    for size in (1, 2, 4, 15, 100):
        shards = shard_requests(samples, size, version=4)
        assert list(chain.from_iterable(shard.samples for shard in shards)) == samples
        assert [shard.index for shard in shards] == list(range(len(shards)))
        assert {shard.version for shard in shards} == {4}
        assert all(len(shard.samples) == size for shard in shards[:-1])


def test_samples_of_a_prompt_stand_next_to_each_other() -> None:
    samples = sample_requests(PROMPTS[:2], 2, 7, 1)
    assert [(s.position, s.prompt.id) for s in samples] == [
        (0, "p0"),
        (1, "p0"),
        (2, "p1"),
        (3, "p1"),
    ]
    assert len({s.seed for s in samples}) == 4
    again, other = sample_requests(PROMPTS[:2], 2, 7, 1), sample_requests(PROMPTS[:2], 2, 7, 2)
    assert again == samples
    assert {s.seed for s in other}.isdisjoint(s.seed for s in samples)


@pytest.mark.parametrize("steps", [[5, 5, 5], [1] * 15, [4, 4, 7], [15]])
def test_a_cursor_goes_through_every_prompt_once_a_pass(steps: list[int]) -> None:
    cursor, first, taken = PromptCursor(PROMPTS, seed=3), 0, []
    for step in steps:
        taken += ids(cursor.take(range(first, first + step)))
        first += step
    passes = [taken[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(one) == ids(PROMPTS) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert taken == ids(PromptCursor(PROMPTS, seed=3).take(range(15)))


def test_a_cursor_shuffles_by_seed() -> None:
    orders = {tuple(ids(PromptCursor(PROMPTS, seed).take(range(5)))) for seed in range(8)}
    assert len(orders) > 4
