"""The target number of generators, computed from the idle times of generators and learners.

Generation and learning alternate: while one works, the other waits. If n generators sample for G
seconds and everything else takes R seconds, G n / R generators would sample in R seconds. Between
the two bounds the target stays. The bounds are far enough apart that no change triggers its
reverse: after doubling, generators wait at most two thirds of the time; after removing one,
learners wait at most a third.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from rlhf_ray.config.rollout import AutoscaleConfig
from rlhf_ray.types import IdleShares

GROW_ABOVE = 0.5
"""Share of the time that learners wait for generators, above which the target grows."""
SHRINK_ABOVE = 0.8
"""Share of the time that generators wait for learners, above which the target shrinks."""


def next_target(
    settings: AutoscaleConfig, ready: int, seen: Sequence[IdleShares], unplaced: int = 0
) -> int:
    """Return the target number of generators: at most twice as many as now, at least one fewer.

    Args:
        settings: limits of the target, and the number of iterations to average over.
        ready: number of ready generators.
        seen: idle shares of each iteration since the target changed.
        unplaced: further generators for which the cluster has no capacity yet. They stay part
            of the target while more generators are needed.
    """
    if len(seen) < settings.iterations:
        return ready + unplaced
    learners = fmean(shares.learners for shares in seen[-settings.iterations :])
    generators = fmean(shares.generators for shares in seen[-settings.iterations :])
    target = ready
    if learners > GROW_ABOVE:
        balanced = ready * learners / (1 - learners) if learners < 1 else math.inf
        target = math.ceil(min(balanced, 2 * ready))
    elif generators > SHRINK_ABOVE:
        target = ready - 1
    if unplaced and target > ready:
        return ready + unplaced
    return min(max(target, settings.minimum), settings.maximum)
