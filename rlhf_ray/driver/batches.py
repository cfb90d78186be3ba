"""The prompts and seeds of an iteration, as functions of the run seed and the iteration alone."""

import hashlib
from collections.abc import Sequence

import numpy as np

from rlhf_ray.types import Prompt, SampleRequest, ShardRequest


def derive_seed(*parts: int | str) -> int:
    """Derive a 31-bit seed from what identifies a sample, never from the generator it goes to."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") & 0x7FFF_FFFF


class PromptCursor:
    """An endless sequence of prompts: passes over the dataset, each shuffled by (seed, pass)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of prompts in a pass."""
        return len(self._prompts)

    def take(self, first: int, count: int) -> list[Prompt]:
        """Return ``count`` prompts of the endless sequence, from number ``first`` on."""
        size = len(self._prompts)
        orders: dict[int, np.ndarray] = {}
        taken: list[Prompt] = []
        for number in range(first, first + count):
            which = number // size
            if which not in orders:
                orders[which] = np.random.default_rng([self._seed, which]).permutation(size)
            taken.append(self._prompts[int(orders[which][number % size])])
        return taken


def sample_requests(
    prompts: Sequence[Prompt], samples_per_prompt: int, *seed_parts: int | str
) -> list[SampleRequest]:
    """Make one request per sample, the samples of a prompt next to each other.

    Group estimators (RLOO, GRPO) rely on this order.
    """
    return [
        SampleRequest(position, prompt, derive_seed(*seed_parts, position))
        for position, prompt in enumerate(
            prompt for prompt in prompts for _ in range(samples_per_prompt)
        )
    ]


def shard_requests(
    samples: Sequence[SampleRequest], shard_size: int, version: int
) -> list[ShardRequest]:
    """Cut a batch into shards of consecutive positions; the last may be shorter."""
    return [
        ShardRequest(index, tuple(samples[first : first + shard_size]), version)
        for index, first in enumerate(range(0, len(samples), shard_size))
    ]
