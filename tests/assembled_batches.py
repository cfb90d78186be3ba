"""Learners as a group, and the batches of eight rollouts that they assemble."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from rlhf_ray.types import AssembledStats, Rollout

Columns = tuple[list[tuple[float, ...]], list[Any]]
SCORES = [0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 0.25, 1.0]


def columns(
    rollouts: list[Rollout], old: list[np.ndarray], shard_sizes: tuple[int, ...] = (3, 3, 2)
) -> Columns:
    """Return scores by shard, and the further arguments of assemble."""
    ref = [logprobs - 0.1 for logprobs in old]
    values = [np.linspace(0, 0.5, len(logprobs), dtype=np.float32) for logprobs in old]
    ends = np.cumsum(shard_sizes)

    def by_shard(rows: list[Any]) -> list[list[Any]]:
        return [rows[end - size : end] for size, end in zip(shard_sizes, ends, strict=True)]

    parts = [shard for column in (rollouts, old, ref, values) for shard in by_shard(column)]
    return [tuple(scores) for scores in by_shard(SCORES)], parts


def assemble(
    learner: Any, policy: Any, rollouts: list[Rollout], kl_coef: float = 0.2
) -> AssembledStats:
    scores, parts = columns(rollouts, policy.logprobs(rollouts)[0])
    return learner.assemble(kl_coef, scores, *parts)


def learnt_state(learner: Any) -> dict[str, torch.Tensor]:
    return learner._engine.export_state()


def as_group(learners: list[Any], call: Callable[[Any], Any]) -> list[Any]:
    """Call the learners as the ranks of one group, which wait for each other in sums."""
    values, meeting = [0.0] * len(learners), threading.Barrier(len(learners), timeout=60)
    computing = threading.Lock()  # one at a time: models are patched while they compute

    def at(rank: int) -> Any:
        def sum_over_ranks(value: float) -> float:
            values[rank] = value
            computing.release()
            meeting.wait()
            total = sum(values)
            meeting.wait()
            computing.acquire()
            return total

        engine = learners[rank]._engine
        engine.rank, engine.world_size = rank, len(learners)
        engine.sum_over_ranks = sum_over_ranks
        with computing:
            return call(learners[rank])

    with ThreadPoolExecutor(len(learners)) as pool:
        return list(pool.map(at, range(len(learners))))
