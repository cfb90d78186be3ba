"""The effective training time ratio: useful over wall seconds, over all processes of a run.

    first process ready                  crash          ready again                    end
    |-- iteration --|-- iteration --|-- redone --|-- down --|-- start --|-- iteration --|
         useful          useful          lost       lost        lost         useful

Useful is the time of iterations whose commit lasted. Lost is everything else, each second once:
iterations that are run again after a crash or were rolled back, the time between a crash and the
next process (`MOST_DOWN_S` of it at most), its start, and what roles report
(`observability.outages`). The first start counts as neither, nor do a pause after a run that ended,
was stopped on request or interrupted by a signal, and the start after it.
"""

from collections import Counter
from typing import Any

from rlhf_ray.driver.checkpoint import RunState
from rlhf_ray.observability.outages import Outages

STOPPED, INTERRUPTED = "stopped", "interrupted"
"""How a process ends in order: after an iteration, or in the middle of one."""
MOST_DOWN_S = 3600.0
"""Longest time from a crash to the next process that counts as lost: what starts runs again does so
sooner, and a longer one says when somebody looked, not what the crash cost."""
ROLES = ("driver", "generator", "reward", "reference", "policy", "critic")


class UsefulTime:
    """Counts useful seconds; reports to the outages what a crash or a rollback cost."""

    def __init__(self, outages: Outages, state: RunState, seen_at: float) -> None:
        """
        Args:
            outages: of the run.
            state: of the commit that this process continues from.
            seen_at: Unix time of the last work that an earlier process recorded; 0 without any.
        """
        self._outages = outages
        self._useful_s = state.useful_s
        self._committed_at = state.committed_at
        self._seen_at = seen_at
        self._is_ready = False

    def ready(self) -> None:
        """Count the start of this process, and what an earlier one left; iterations begin."""
        started_s, outages, self._is_ready = self._outages.lap(), self._outages, True
        records = [record for record in outages.records() if record["role"] == "driver"]
        starts = [record["time"] for record in records if record["cause"] == "start"]
        if not starts:  # the first process, or the first of this version
            outages.write("driver", "start", 0.0)
            return
        last, since = records[-1], max(self._committed_at, starts[-1])
        if last["cause"] == STOPPED and last.get("committed_at") == self._committed_at:
            self._useful_s = last["useful_s"]
            outages.write("driver", "start", 0.0)
            return
        is_pause = last["cause"] in (STOPPED, INTERRUPTED)
        ended_at = min(max(last["time"] if is_pause else self._seen_at, since), outages.began_at)
        known_s = sum(r["lost_s"] for r in outages.records() if since < r["time"] <= ended_at)
        outages.write("driver", "redone", max(0.0, ended_at - since - known_s))
        down_s = 0.0 if is_pause else min(outages.began_at - ended_at, MOST_DOWN_S)
        outages.write("driver", "down", max(0.0, down_s), restarts=1)
        outages.write("driver", "start", 0.0 if is_pause else started_s)

    def settle(self, at: float, *, is_learnt: bool) -> dict[str, float]:
        """Count the time since the last commit; return what the commit that is made now keeps.

        Args:
            at: Unix time now.
            is_learnt: whether the time was useful; else a rollback undid its work.
        """
        seconds, self._committed_at = self._outages.lap(), at
        if is_learnt:
            self._useful_s += seconds
        else:
            self._outages.write("driver", "rolled back", seconds)
        return {"useful_s": self._useful_s, "committed_at": at}

    def stopped(self) -> None:
        """Count the time since the last commit as useful: the run ends, or was stopped."""
        self._useful_s += self._outages.lap()
        self._outages.write(
            "driver", STOPPED, 0.0, useful_s=self._useful_s, committed_at=self._committed_at
        )

    def interrupted(self) -> None:
        """Begin a pause: a signal ends the run, and the work since the last commit is done again.

        Whatever ends the process from here on, the next one counts none of the time until then.
        """
        if not self._is_ready:
            self.ready()  # what an earlier process left still counts
        self._outages.write("driver", INTERRUPTED, 0.0)

    @property
    def ratio(self) -> float:
        """The effective training time ratio; 1 before anything was lost."""
        lost_s = sum(self._outages.lost_s.values())
        return self._useful_s / (self._useful_s + lost_s) if lost_s else 1.0

    def summary(self, generator_restarts: int) -> dict[str, Any]:
        """Return the ratio, lost seconds by cause and restarts by role, for the summary.

        Args:
            generator_restarts: those that the commits count.
        """
        counted = self._outages.restarts | Counter(generator=generator_restarts)  # the larger one
        return {
            "restarts": dict.fromkeys(ROLES, 0) | counted,
            "effective_time_ratio": self.ratio,
            "seconds_useful": self._useful_s,
            "seconds_lost": dict(self._outages.lost_s),
        }
