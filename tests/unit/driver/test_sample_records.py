import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_ray.config import Config, resolve
from rlhf_ray.driver.batches import whitens
from rlhf_ray.driver.records.samples import SampleRecords
from rlhf_ray.types import (
    AssembledStats,
    Mismatch,
    Prompt,
    Rollout,
    ScoredShard,
    Shard,
    ShardInfo,
)

LENGTHS = (2, 1, 3, 1, 2, 2, 1, 1)
SCORES = (1.0, 3.0, 0.5, 0.0, 2.0, 2.0, -1.0, 1.0)
STATS = AssembledStats(
    num_samples=8,
    num_tokens=13,
    advantage_total=13 * 0.5,
    advantage_total_sq=13 * 0.25 + 12 * 4.0,  # mean .5, unbiased deviation 2
    kl_total=0.0,
    reward_total=0.0,
    neg_logprob_sum=0.0,
)


def config(folder: Path, samples: int, tokens: int, **ppo: Any) -> Config:
    return resolve(
        {
            "run": {"dir": str(folder), "record": {"samples": samples, "tokens": tokens}},
            "cluster": {"mode": "inline"},
            "rollout": {"engine": "transformers", "max_tokens": 8},
            "ppo": {
                "batch_size": 8,
                "mini_batch_size": 8,
                "samples_per_prompt": 2,
                "advantage": "rloo",
                **ppo,
            },
        }
    )


def batch() -> list[ScoredShard]:
    """Eight samples of four prompts, in shards of three; old log-probs lie .5 above the
    reference's, and the engine's .25 below them."""
    shards = []
    for index, positions in enumerate(((0, 1, 2), (3, 4, 5), (6, 7))):
        lengths = [LENGTHS[position] for position in positions]
        old = [np.full(length, -1.0, dtype=np.float32) for length in lengths]
        rollouts = [
            Rollout(
                position=position,
                prompt=Prompt(f"p{position // 2}", f"prompt {position // 2}", (1, 2)),
                response_ids=np.arange(10, 10 + length),
                rollout_logprobs=row - 0.25,
                finish_reason="stop",
                version=6,
                text=f"answer {position}",
            )
            for position, length, row in zip(positions, lengths, old, strict=True)
        ]
        scores = tuple(SCORES[position] for position in positions)
        info = ShardInfo(index, positions, tuple(lengths), (True,) * len(lengths), (6,) * 3)
        shards.append(
            ScoredShard(
                shard=Shard(info, rollouts),  # type: ignore[arg-type]
                raw_scores={"model": scores},
                old_logprobs=old,  # type: ignore[arg-type]
                ref_logprobs=[row - 0.5 for row in old],  # type: ignore[arg-type]
                values=None,
                mismatch=Mismatch(0.25, 0.25, sum(lengths)),
                scores=scores,
            )
        )
    return shards


def records_of(config: Config) -> tuple[list[dict[str, Any]], int]:
    """Return the records, and the number of handles that were fetched."""
    num_fetched = 0

    async def fetch(handle: Any) -> Any:
        nonlocal num_fetched
        num_fetched += 1
        return handle

    made = SampleRecords(config, fetch, lambda token: f"<{token}>", whitened=whitens(config.ppo))
    return asyncio.run(made.of(7, batch(), STATS, kl_coef=0.0)), num_fetched


def test_a_record_holds_texts_scores_and_sums_over_tokens(tmp_path: Path) -> None:
    records, num_fetched = records_of(config(tmp_path, samples=4, tokens=0))
    assert [record["position"] for record in records] == [0, 1, 2, 3]
    assert num_fetched == 6  # rollouts and two log-probs of two shards; the third is not brought
    assert records[2] == {
        "iteration": 7,
        "version": 6,
        "position": 2,
        "prompt_id": "p1",
        "prompt": "prompt 1",
        "response": "answer 2",
        "score": 0.5,
        "scores": {"model": 0.5},
        "kl": 1.5,  # three tokens of .5
        "mismatch": 0.25,
        "distinct_bigrams": 1.0,
        "length": 3,
        "finish_reason": "stop",
    }


def test_tokens_have_the_advantages_that_were_learnt_from(tmp_path: Path) -> None:
    records, _ = records_of(config(tmp_path, 6, 3, whiten_advantages=False))
    tokens = [record.get("tokens") for record in records]
    assert tokens[3:] == [None] * 3
    # RLOO: each score less that of the prompt's other response.
    assert [each["advantage"] for each in tokens[:3]] == [[-2.0] * 2, [2.0], [0.5] * 3]
    assert tokens[2] == {
        "ids": [10, 11, 12],
        "texts": ["<10>", "<11>", "<12>"],
        "advantage": [0.5] * 3,
        "kl": [0.5] * 3,
        "mismatch": [-0.25] * 3,
    }


def test_advantages_are_whitened_by_the_whole_batch(tmp_path: Path) -> None:
    records, _ = records_of(config(tmp_path, 2, 2, whiten_advantages=True))
    whitened = [record["tokens"]["advantage"][0] for record in records]
    assert whitened == pytest.approx([(-2 - 0.5) / 2, (2 - 0.5) / 2], abs=1e-4)


def test_a_prompt_without_all_of_its_responses_has_no_advantages(tmp_path: Path) -> None:
    records, _ = records_of(config(tmp_path, 3, 3))
    assert [record["tokens"]["advantage"] is None for record in records] == [False, False, True]
    assert records[2]["tokens"]["kl"] == [0.5] * 3


def test_nothing_is_brought_where_nothing_is_recorded(tmp_path: Path) -> None:
    assert records_of(config(tmp_path, 0, 16)) == ([], 0)
