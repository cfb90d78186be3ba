"""How much of the time each actor had something to do."""

from collections import defaultdict


class BusyTime:
    """Adds up the calls of actors, counting what overlaps once.

    Args:
        since_s: from when on, Unix seconds.
    """

    def __init__(self, since_s: float) -> None:
        self._since_s = since_s
        self._calls: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, actor: str, start_s: float, end_s: float) -> None:
        """A call that an actor worked on, Unix seconds."""
        self._calls[actor].append((start_s, end_s))

    def shares(self, now_s: float) -> dict[str, float]:
        """Busy share of every actor known so far, since this was last asked; 0: it had no call."""
        length_s = max(now_s - self._since_s, 1e-9)
        shares = {
            actor: self._covered_s(sorted(calls)) / length_s for actor, calls in self._calls.items()
        }
        self._since_s = now_s
        for calls in self._calls.values():
            calls.clear()
        return shares

    def forget(self, actor: str) -> None:
        """It has left."""
        self._calls.pop(actor, None)

    def actors(self) -> list[str]:
        """Those known so far."""
        return list(self._calls)

    def _covered_s(self, calls: list[tuple[float, float]]) -> float:
        covered_s, reached_s = 0.0, self._since_s
        for start_s, end_s in calls:
            covered_s += max(0.0, end_s - max(start_s, reached_s))
            reached_s = max(reached_s, end_s)
        return covered_s
