"""The queue of a batch's shards, and the idle times of generators and learners."""

import time
from collections.abc import Callable, Sequence

from rlhf_ray.types import IdleShares, ShardRequest


class ShardQueue:
    """The waiting shards, longest prompts first.

    Longest first, because a long shard that starts last would keep all other generators waiting.
    """

    def __init__(self, requests: Sequence[ShardRequest]) -> None:
        self._waiting = sorted(requests, key=_prompt_tokens)

    def __len__(self) -> int:
        """Return the number of waiting shards."""
        return len(self._waiting)

    def take(self) -> ShardRequest:
        """Return the next shard, which waits no longer."""
        return self._waiting.pop()

    def put_back(self, requests: Sequence[ShardRequest]) -> None:
        """Have shards wait again, each at its place."""
        self._waiting = sorted([*self._waiting, *requests], key=_prompt_tokens)


def _prompt_tokens(request: ShardRequest) -> int:
    return sum(len(sample.prompt.token_ids) for sample in request.samples)


NOTHING_YET = IdleShares(0.0, 0.0, 0.0)


class IdleTimes:
    """Integrates the counts given to `note` over time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now = clock()
        self._busy = self._serving = self._waiting = 0
        self._is_awaited = False
        self._reset()

    def _reset(self) -> None:
        self._total_s = self._awaited_s = self._busy_s = self._serving_s = 0.0
        self._waiting_s = 0.0

    def note(self, busy: int, serving: int, waiting: int, is_awaited: bool) -> None:
        """Set the counts that hold from now on.

        Args:
            busy: number of generators that are sampling.
            serving: number of generators that could sample.
            waiting: number of waiting shards.
            is_awaited: whether learners wait for a batch.
        """
        now = self._clock()
        passed_s, self._now = now - self._now, now
        self._total_s += passed_s
        self._busy_s += passed_s * self._busy
        self._serving_s += passed_s * self._serving
        if self._is_awaited:
            self._awaited_s += passed_s
            self._waiting_s += passed_s * self._waiting
        self._busy, self._serving = busy, serving
        self._waiting, self._is_awaited = waiting, is_awaited

    def lap(self) -> IdleShares:
        """Return the idle shares since the last call, and start again from zero."""
        self.note(self._busy, self._serving, self._waiting, self._is_awaited)
        shares = IdleShares(
            learners=_share(self._awaited_s, self._total_s),
            generators=_share(self._serving_s - self._busy_s, self._serving_s),
            queue_depth=_share(self._waiting_s, self._awaited_s),
        )
        self._reset()
        return shares


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
