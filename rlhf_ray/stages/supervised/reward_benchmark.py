"""How often a reward model prefers the better answer, by kind of pair (as RewardBench does)."""

import asyncio
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from rlhf_ray.config import Config
from rlhf_ray.config.rewards import ModelSourceConfig
from rlhf_ray.data.datasets.preferences import load_pairs
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.rows import Row, batches
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.models.loading import load_tokenizer
from rlhf_ray.observability.progress import Bar, Progress
from rlhf_ray.placement.layout import demands
from rlhf_ray.stages.ppo.roles import RoleSpawner, spawn_scorers
from rlhf_ray.types import Prompt, Rollout, Shard, ShardInfo

NO_SUBSET = "all"
"""Subset of rows without a column ``subset``."""


def benchmark(config: Config, model: str) -> dict[str, Any]:
    """Accuracy of a reward model on ``reward.benchmark``; a tie counts as wrong.

    Args:
        config: the run's.
        model: folder or hub name of the reward model.

    Returns:
        ``accuracy`` over all pairs; ``subsets``: name -> ``accuracy``, ``pairs`` and the ``rows``
        that were dropped, by reason.

    Raises:
        DataError: the set cannot be read, or too many of a subset's rows cannot be used.
    """
    renderer = Renderer(load_tokenizer(model), config.template)
    pairs, counts = {}, {}
    for name, rows in _by_subset(config).items():
        pairs[name], counts[name] = load_pairs(
            rows,
            renderer,
            config.model.max_length,
            config.data.overlong,
            config.data.max_bad_share,
            f"reward.benchmark ({name})",
        )
    total = sum(map(len, pairs.values()))
    with Progress(config.run.stages).stage("benchmark", total, "pair") as bar:
        wins = asyncio.run(_wins(config, model, pairs, bar))
    subsets = {
        name: {"accuracy": sum(won) / len(won), "pairs": len(won), "rows": counts[name]}
        for name, won in wins.items()
    }
    everything = [win for won in wins.values() for win in won]
    return {"accuracy": sum(everything) / total, "pairs": total, "subsets": subsets}


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
    config: Config, model: str, pairs: dict[str, Dataset], bar: Bar
) -> dict[str, list[bool]]:
    """Whether the chosen answer of each pair scores higher, by subset."""
    alone = config.model_copy(update={"rewards": [ModelSourceConfig(path=model)]})
    spawner = RoleSpawner(config, lambda *_: None)
    await spawner.place([d for d in demands(alone) if d.role == "reward"])
    scorer = spawn_scorers(spawner, alone, None, policy_model=model)
    size = config.rollout.shard_size

    async def compare(chunk: Sequence[Any]) -> list[bool]:
        sides = [_answer(row[side]) for row in chunk for side in ("chosen_ids", "rejected_ids")]
        (scores,) = (await scorer.score(_shard(sides))).values()
        bar.advance(len(chunk))
        return [
            better is not None and worse is not None and better > worse
            for better, worse in zip(scores[0::2], scores[1::2], strict=True)
        ]

    try:
        await spawner.start_all([])
        wins = {}
        for name, rows in pairs.items():
            listed: list[Any] = rows.to_list()
            chunks = (listed[start : start + size] for start in range(0, len(listed), size))
            found = await asyncio.gather(*map(compare, chunks))
            wins[name] = [win for chunk in found for win in chunk]
        return wins
    finally:
        await spawner.stop_all()


def _answer(ids: Sequence[int]) -> Rollout:
    """A rollout of which the scorer reads the tokens alone."""
    tokens = np.asarray(ids, np.int64)
    nothing = np.zeros(len(tokens), np.float32)
    return Rollout(0, Prompt("", "", ()), tokens, nothing, "stop", 0, "")


def _shard(rollouts: list[Rollout]) -> Shard:
    return Shard(ShardInfo(0, (), (), (), ()), rollouts)
