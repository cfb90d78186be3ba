"""How many generators to want, from who waited for whom: pure arithmetic.

Generating and learning take turns, so while one works the other waits. With G seconds of
generation by n generators and R seconds of everything else, G n / R of them would take as long as
the rest. Between the two bounds nothing changes: twice as many generators, asked for at half, wait
at most two thirds of the time, and one fewer, asked for at four fifths, lets learners wait at most
a third. So no change calls for its own reverse.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from rlhf_ray.config.rollout import AutoscaleConfig
from rlhf_ray.types import IdleShares

GROW_ABOVE = 0.5
"""Share of the time that learners wait for generators."""
SHRINK_ABOVE = 0.8
"""Share of the time that generators wait for learners."""


def next_target(
    settings: AutoscaleConfig, ready: int, seen: Sequence[IdleShares], without_room: int = 0
) -> int:
    """Generators to want, at most twice as many as now, or one fewer.

    Args:
        settings: bounds, and how many iterations to look at.
        ready: generators now.
        seen: of each iteration since their number changed.
        without_room: more that are wanted and find no place; they stay wanted while more are.
    """
    if len(seen) < settings.iterations:
        return ready + without_room
    learners = fmean(shares.learners for shares in seen[-settings.iterations :])
    generators = fmean(shares.generators for shares in seen[-settings.iterations :])
    wanted = ready
    if learners > GROW_ABOVE:
        balanced = ready * learners / (1 - learners) if learners < 1 else math.inf
        wanted = math.ceil(min(balanced, 2 * ready))
    elif generators > SHRINK_ABOVE:
        wanted = ready - 1
    if without_room and wanted > ready:
        return ready + without_room
    return min(max(wanted, settings.minimum), settings.maximum)
