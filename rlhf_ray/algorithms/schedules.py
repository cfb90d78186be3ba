"""Learning rates over a run, as pure functions of the iteration: a resumed run has the same."""

import math
from typing import Literal

Scheduler = Literal["constant", "linear", "cosine"]


def learning_rate_share(
    iteration: int, num_iterations: int, scheduler: Scheduler, num_warmup: int = 0
) -> float:
    """Return the learning rate of an iteration as a share of its peak, in (0, 1].

        warm-up    i / num_warmup                    for i <= num_warmup
        linear     1 - p                             p = (i - 1 - num_warmup)
        cosine     (1 + cos(pi p)) / 2                   / (num_iterations - num_warmup)

    These are the schedules of transformers, but for the warm-up's first step: there its rate is 0,
    which would waste an iteration. Source of cosine: Loshchilov and Hutter 2016 (arXiv:1608.03983).

    Args:
        iteration: i, from 1 on.
        num_iterations: of the whole run.
        scheduler: the decay after the warm-up.
        num_warmup: iterations of linear warm-up; the last of them has the peak.
    """
    if iteration <= num_warmup:
        return iteration / num_warmup
    if scheduler == "constant":
        return 1.0
    progress = min((iteration - 1 - num_warmup) / max(num_iterations - num_warmup, 1), 1.0)
    return 1 - progress if scheduler == "linear" else (1 + math.cos(math.pi * progress)) / 2
