"""Restarts of roles, and the time that a run stood still, by cause.

Whoever restarts a role or waits because something failed reports it here. The records are kept in
``ppo/outages.jsonl`` over all processes of a run; a resume does not cut them back, because what
happened has happened, also in iterations that are run again.
"""

import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rlhf_ray.observability.sinks import JsonlSink


class Outages:
    """The restarts and lost seconds of a run; without a file, those of this process alone."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = JsonlSink(path) if path else None
        self.restarts: Counter[str] = Counter()
        """Role -> number of restarts."""
        self.lost_s: dict[str, float] = defaultdict(float)
        """``role: cause`` -> seconds in which the run stood still."""
        for record in self._file.records() if self._file else ():
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

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _report(self, role: str, cause: str, seconds: float, restarts: int) -> None:
        record = {
            "time": time.time(),
            "role": role,
            "cause": cause,
            "seconds": seconds,
            "restarts": restarts,
        }
        self._count(record)
        if self._file is not None:
            self._file.append(record)

    def _count(self, record: dict[str, Any]) -> None:
        if record["restarts"]:
            self.restarts[record["role"]] += record["restarts"]
        if record["seconds"]:
            self.lost_s[f"{record['role']}: {record['cause']}"] += record["seconds"]
