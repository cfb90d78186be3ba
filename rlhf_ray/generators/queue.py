"""Which shards of a batch wait, who has the others, and what came of them."""

import asyncio
import time
from collections.abc import Callable, Sequence

from rlhf_ray.types import IdleShares, Shard, ShardRequest


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


NOTHING_YET = IdleShares(0.0, 0.0, 0.0)


class IdleTimes:
    """Adds up what holds between two calls of `note`.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now = clock()
        self._busy = self._serving = 0
        self._waiting: int | None = None
        self._reset()

    def _reset(self) -> None:
        self._total_s = self._generating_s = self._busy_s = self._serving_s = 0.0
        self._waiting_s = 0.0

    def note(self, busy: int, serving: int, waiting: int | None) -> None:
        """From now on, ``busy`` of ``serving`` generators sample.

        Args:
            busy: generators that sample.
            serving: generators that could.
            waiting: shards that wait for one; None: no batch is being generated.
        """
        now = self._clock()
        passed_s, self._now = now - self._now, now
        self._total_s += passed_s
        self._busy_s += passed_s * self._busy
        self._serving_s += passed_s * self._serving
        if self._waiting is not None:
            self._generating_s += passed_s
            self._waiting_s += passed_s * self._waiting
        self._busy, self._serving, self._waiting = busy, serving, waiting

    def lap(self) -> IdleShares:
        """Shares since the last lap."""
        self.note(self._busy, self._serving, self._waiting)
        shares = IdleShares(
            learners=_share(self._generating_s, self._total_s),
            generators=_share(self._serving_s - self._busy_s, self._serving_s),
            queue_depth=_share(self._waiting_s, self._generating_s),
        )
        self._reset()
        return shares


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
