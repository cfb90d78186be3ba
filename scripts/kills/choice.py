"""Which process dies when: pure, the same for the same seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from kill_at_phase import EDGES, PHASES

ROLES = ("generator", "engine", "reward", "reference", "policy", "critic", "driver", "node")
"""What is killed: a process of a role (``engine``: of the generator's engine; ``node``: the raylet
of a node, with all that runs on it)."""
FIRST_ITERATION = 2
"""Earliest iteration of a run's first kill."""
GAP = 1
"""Least iterations between two kills of a run."""
BOUNDARIES = tuple((edge, phase) for phase in PHASES for edge in EDGES)


@dataclass(frozen=True)
class Kill:
    """One kill of a run."""

    number: int
    """Among all kills of a seed."""
    role: str
    iteration: int
    """The earliest one."""
    boundary: tuple[str, str] | None
    """Edge and phase at which it strikes; None: at a random moment."""
    moment: float
    """Of a kill at a random moment: the share of an iteration that passes before it, in [0, 1)."""
    which: float
    """Chooses between the processes of the role, in [0, 1)."""


@dataclass(frozen=True)
class Plan:
    """All kills of a seed, in runs of a few."""

    seed: int
    roles: Sequence[str] = ROLES
    per_run: int = 6
    at_boundaries: bool = False

    @property
    def iterations(self) -> int:
        """Return the iterations of a run: enough for its kills, and some in peace at the end."""
        return FIRST_ITERATION + GAP * self.per_run + 2

    def kill(self, number: int) -> Kill:
        """Return a kill; each role is dealt once before any comes again."""
        deck, card = divmod(number, len(self.roles))
        chance = random.Random(f"{self.seed}/{deck}")
        role = chance.sample(list(self.roles), len(self.roles))[card]
        chance = random.Random(f"{self.seed}/{deck}/{card}")
        boundary = BOUNDARIES[number % len(BOUNDARIES)] if self.at_boundaries else None
        iteration = FIRST_ITERATION + GAP * (number % self.per_run)
        return Kill(number, role, iteration, boundary, chance.random(), chance.random())

    def run_of(self, number: int) -> list[Kill]:
        """Return the kills of the run that begins with kill ``number``."""
        return [self.kill(each) for each in range(number, number + self.per_run)]
