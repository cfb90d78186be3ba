"""Accuracy of a reward model by kind of pair, as RewardBench measures it."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import cast

import numpy as np
from datasets import Dataset

from rlhf_ray import interruption
from rlhf_ray.cluster.spawner import RoleSpawner
from rlhf_ray.config import Config
from rlhf_ray.config.rewards import ModelSourceConfig
from rlhf_ray.data.datasets.preferences import load_pairs
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.rows import Row, batches
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.data.reading.tables import TokenRow
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.placement.layout import demands
from rlhf_ray.stages.ppo.roles import spawn_scorers
from rlhf_ray.stages.supervised.pairs import load_parts
from rlhf_ray.types import Handle, Prompt, Rollout, Shard, ShardInfo

NO_SUBSET = "all"
"""Name of the subset of rows without a column ``subset``."""


def benchmark(config: Config, model: str) -> dict[str, object]:
    """Measure the accuracy of a reward model on ``reward.benchmark``; a tie counts as wrong.

    Returns:
        ``accuracy`` over all pairs; ``subsets``: name -> ``accuracy``, ``pairs`` and the ``rows``
        that were dropped, by reason.

    Raises:
        DataError: the set cannot be read, or too many of a subset's rows cannot be used.
    """
    what = "reward.benchmark"
    pairs, counts = load_parts(_by_subset(config), load_pairs, config, model, what)
    total = sum(map(len, pairs.values()))
    progress = Progress(config.run.stages)
    with progress.stage("benchmark", total, "pair") as bar:
        wins = interruption.run(_wins(config, model, pairs, bar, progress.say))
    subsets = {
        name: {"accuracy": sum(won) / len(won), "pairs": len(won), "rows": counts[name]}
        for name, won in wins.items()
    }
    return {"accuracy": sum(map(sum, wins.values())) / total, "pairs": total, "subsets": subsets}


def _by_subset(config: Config) -> dict[str, list[Row]]:
    assert config.reward.benchmark is not None
    tally = RowTally("reward.benchmark", config.data.max_bad_share)
    subsets: dict[str, list[Row]] = defaultdict(list)
    for batch in batches(load_rows(config.reward.benchmark, "preferences"), tally):
        for _, row in batch:
            subsets[str(row.get("subset") or NO_SUBSET)].append(row)
            tally.keep()
    tally.finish()
    return dict(sorted(subsets.items()))


async def _wins(
    config: Config, model: str, pairs: dict[str, Dataset], bar: Bar, say: Callable[[str], None]
) -> dict[str, list[bool]]:
    """Return for each pair, by subset, whether its chosen answer scores higher."""
    alone = config.model_copy(update={"rewards": [ModelSourceConfig(path=model)]})
    spawner = RoleSpawner(config, lambda *_: None, say=say)
    await spawner.place([d for d in demands(alone) if d.role == "reward"])
    scorer = spawn_scorers(spawner, alone, None, policy_model=model)
    size = config.rollout.shard_size

    async def compare(chunk: Sequence[TokenRow]) -> list[bool]:
        answers = [_answer(row[side]) for row in chunk for side in ("chosen_ids", "rejected_ids")]
        # A call takes the data itself where it takes a handle.
        rollouts = cast("Handle[list[Rollout]]", answers)
        (scores,) = (await scorer.score(Shard(ShardInfo(0, (), (), (), ()), rollouts))).values()
        bar.advance(len(chunk))
        return [
            better is not None and worse is not None and better > worse
            for better, worse in zip(scores[0::2], scores[1::2], strict=True)
        ]

    try:
        await spawner.start_all([])
        wins = {}
        for name, data in pairs.items():
            rows: list[TokenRow] = data.to_list()
            chunks = (rows[i : i + size] for i in range(0, len(rows), size))
            wins[name] = list(chain.from_iterable(await asyncio.gather(*map(compare, chunks))))
        return wins
    finally:
        await spawner.stop_all()


def _answer(ids: Sequence[int]) -> Rollout:
    """Wrap token ids as a rollout; the scorer reads nothing else of it."""
    tokens = np.asarray(ids, np.int64)
    no_logprobs = np.zeros(len(tokens), np.float32)
    return Rollout(0, Prompt("", "", ()), tokens, no_logprobs, "stop", 0, "")
