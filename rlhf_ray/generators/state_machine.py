"""The states of a generator's life, and what may follow what.

    starting --> stale <--> ready      a publication makes a ready one stale until it serves it
       ^           |          |
       |           v          v        (from starting as well)
    restarting <- dead <- suspect

From any of them a generator may be retired, which is the end.
"""

from collections.abc import Mapping

from rlhf_ray.types import GeneratorState

FOLLOWERS: Mapping[GeneratorState, frozenset[GeneratorState]] = {
    "starting": frozenset({"stale", "suspect", "retired"}),
    "stale": frozenset({"ready", "suspect", "retired"}),
    "ready": frozenset({"stale", "suspect", "retired"}),
    "suspect": frozenset({"dead", "retired"}),
    "dead": frozenset({"restarting", "retired"}),
    "restarting": frozenset({"starting", "retired"}),
    "retired": frozenset(),
}
"""State -> the states that may come next."""


class Life:
    """Where one generator is in its life; a new one is starting."""

    def __init__(self) -> None:
        self.state: GeneratorState = "starting"

    def to(self, state: GeneratorState) -> None:
        """Go on.

        Raises:
            RuntimeError: this state does not follow the one before.
        """
        if state not in FOLLOWERS[self.state]:
            raise RuntimeError(f"A generator that is {self.state} cannot become {state}")
        self.state = state
