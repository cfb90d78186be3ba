"""How long generators and learners wait for each other, from what each moment looks like."""

import time
from collections.abc import Callable

from rlhf_ray.types import IdleShares

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
