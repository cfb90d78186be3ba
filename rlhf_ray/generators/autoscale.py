"""The target number of generators, computed from the idle times of generators and learners.

If n generators sample for G seconds and everything else takes R seconds, G n / R generators would
sample in R seconds. Between the two bounds the target stays. The bounds are far enough apart that
no change triggers its reverse.

Where generation and learning take turns, one waits while the other works: learners G / (G + R) of
the time, generators R / (G + R). After doubling, generators wait at most two thirds of the time;
after removing one, learners wait at most a third. Where batches are generated ahead, only the
faster side waits: learners (G - R) / G of the time, or generators (R - G) / R. After doubling, or
removing one, the other side waits a little at most.
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
AHEAD = 0.2
"""Where batches are generated ahead: share of the time that learners wait above which the target
grows, and that generators would still wait after one of them was removed above which it shrinks."""


def next_target(
    settings: AutoscaleConfig,
    ready: int,
    seen: Sequence[IdleShares],
    unplaced: int = 0,
    *,
    is_ahead: bool = False,
) -> int:
    """Return the target number of generators: at most twice as many as now, at least one fewer.

    Args:
        settings: limits of the target, and the number of iterations to average over.
        ready: number of ready generators.
        seen: idle shares of each iteration since the target changed.
        unplaced: further generators for which the cluster has no capacity yet. They stay part
            of the target while more generators are needed.
        is_ahead: whether batches are generated ahead of the one that is learnt.
    """
    if len(seen) < settings.iterations:
        return ready + unplaced
    learners = fmean(shares.learners for shares in seen[-settings.iterations :])
    generators = fmean(shares.generators for shares in seen[-settings.iterations :])
    target = ready
    if learners > (AHEAD if is_ahead else GROW_ABOVE):
        load = 1.0 if is_ahead else learners
        balanced = ready * load / (1 - learners) if learners < 1 else math.inf
        target = math.ceil(min(balanced, 2 * ready))
    elif generators > (AHEAD + (1 - AHEAD) / ready if is_ahead else SHRINK_ABOVE):
        target = ready - 1
    if unplaced and target > ready:
        return ready + unplaced
    return min(max(target, settings.minimum), settings.maximum)
