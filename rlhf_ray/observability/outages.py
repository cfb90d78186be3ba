"""Restarts of roles, and the time that a run lost, by cause; each second counts once.

Whoever restarts a role or waits because something failed reports it here when it is over. The
records are kept in ``ppo/outages.jsonl`` over all processes of a run; a resume does not cut them
back, because what happened has happened, also in iterations that are run again.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.observability.sinks import JsonlSink


class Outages:
    """The restarts and lost seconds of a run; without a file, those of this process alone."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = JsonlSink(path) if path else None
        self.began_at = time.time()
        """Unix time at which this process began."""
        self._lap_began_s = time.monotonic()
        self._stood_still: list[tuple[float, float]] = []
        """Disjoint intervals of the current lap."""
        self.restarts: Counter[str] = Counter()
        """Role -> number of restarts."""
        self.lost_s: dict[str, float] = defaultdict(float)
        """``role: cause`` -> seconds in which the run stood still."""
        for record in self.records():
            self._count(record)

    def restarted(self, role: str, cause: str, seconds: float) -> None:
        """Count a restart of a process of a role, or of a whole learner group.

        Args:
            role: such as ``policy``, ``critic``, ``reward``, ``reference``, ``generator``.
            cause: a few words without numbers, such as ``died``, ``deadline``, ``node lost``.
            seconds: for which the run stood still until now; 0 if it continued meanwhile.
        """
        self._report(role, cause, seconds, 1)

    def lost(self, role: str, cause: str, seconds: float) -> None:
        """Count seconds up to now in which the run stood still, without a restart.

        ``role`` is ``driver`` where no role is at fault: a full disk, a wait for placement.
        """
        self._report(role, cause, seconds, 0)

    def lap(self) -> float:
        """Return the seconds since the last lap in which the run did not stand still."""
        began_s, self._lap_began_s = self._lap_began_s, time.monotonic()
        stood_still, self._stood_still = self._stood_still, []
        return self._lap_began_s - began_s - _length(stood_still)

    def write(
        self, role: str, cause: str, lost_s: float, *, restarts: int = 0, **more: float
    ) -> None:
        """Keep a record whose lost seconds no other record counts."""
        record = {
            "time": time.time(),
            "role": role,
            "cause": cause,
            "restarts": restarts,
            "lost_s": lost_s,
            **more,
        }
        self._count(record)
        if self._file is not None:
            self._file.append(record)

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all processes so far, without lines that are damaged."""
        return (
            [record for record in self._file.records() if _is_whole(record)] if self._file else []
        )

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _report(self, role: str, cause: str, seconds: float, restarts: int) -> None:
        now_s = time.monotonic()
        lost_s = self._add(max(now_s - seconds, self._lap_began_s), now_s)
        self.write(role, cause, lost_s, restarts=restarts, seconds=seconds)

    def _add(self, start_s: float, end_s: float) -> float:
        """Add an interval to those of this lap; return the seconds that none of them covered."""
        before_s = _length(self._stood_still)
        merged: list[tuple[float, float]] = []
        for start, end in sorted([*self._stood_still, (start_s, end_s)]):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self._stood_still = merged
        return _length(merged) - before_s

    def _count(self, record: dict[str, Any]) -> None:
        if record["restarts"]:
            self.restarts[record["role"]] += record["restarts"]
        if record["lost_s"]:
            self.lost_s[f"{record['role']}: {record['cause']}"] += record["lost_s"]


def _is_whole(record: dict[str, Any]) -> bool:
    match record:
        case {
            "time": int() | float(),
            "role": str(),
            "cause": str(),
            "restarts": int(),
            "lost_s": int() | float(),
        }:
            return True
    return False


def _length(intervals: Sequence[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)
