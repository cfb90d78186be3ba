"""Which shards of a batch wait, who has the others, and what came of them."""

import asyncio
from collections.abc import Sequence

from rlhf_ray.types import Shard, ShardRequest


class ShardQueue:
    """Longest prompts first, each shard with one generator at a time: plain bookkeeping.

    Args:
        requests: the batch, each shard with an index of its own.
    """

    def __init__(self, requests: Sequence[ShardRequest]) -> None:
        self._waiting = sorted(requests, key=_prompt_tokens)
        self._held: dict[tuple[str, int], ShardRequest] = {}

    def __len__(self) -> int:
        """Shards that wait."""
        return len(self._waiting)

    def take(self, name: str) -> ShardRequest:
        """The next shard, for a generator."""
        request = self._waiting.pop()
        self._held[name, request.index] = request
        return request

    def holds(self, name: str, request: ShardRequest) -> bool:
        """Whether a generator has a shard still; not after it was handed back."""
        return (name, request.index) in self._held

    def finish(self, name: str, request: ShardRequest) -> None:
        """A generator is done with a shard that it holds."""
        del self._held[name, request.index]

    def hand_back(self, name: str) -> int:
        """Have all that a generator has not finished wait again; returns their samples."""
        keys = [key for key in self._held if key[0] == name]
        back = [self._held.pop(key) for key in keys]
        self._waiting = sorted([*self._waiting, *back], key=_prompt_tokens)
        return sum(len(request.samples) for request in back)


class Batch:
    """Shards that are asked for, and what came of them."""

    def __init__(self, requests: Sequence[ShardRequest]) -> None:
        self.queue = ShardQueue(requests)
        self.done: asyncio.Queue[Shard | BaseException] = asyncio.Queue()
        """Finished shards; an error ends the batch."""


def _prompt_tokens(request: ShardRequest) -> int:
    return sum(len(sample.prompt.token_ids) for sample in request.samples)
