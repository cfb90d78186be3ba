"""The prompts and seeds of an iteration, as functions of the run seed and the iteration alone."""

import hashlib
from collections.abc import Sequence

import numpy as np

from rlhf_ray.errors import RlhfError
from rlhf_ray.types import Prompt, SampleRequest, ScoredShard, ShardRequest, StepReport


def derive_seed(*parts: int | str) -> int:
    """Derive a 31-bit seed from what identifies a sample, never from the generator it goes to."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") & 0x7FFF_FFFF


class PromptCursor:
    """An endless sequence of prompts: passes over the dataset, each shuffled by (seed, pass)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of prompts in a pass."""
        return len(self._prompts)

    def take(self, first: int, count: int) -> list[Prompt]:
        """Return ``count`` prompts of the endless sequence, from number ``first`` on."""
        size = len(self._prompts)
        orders: dict[int, np.ndarray] = {}
        taken: list[Prompt] = []
        for number in range(first, first + count):
            which = number // size
            if which not in orders:
                orders[which] = np.random.default_rng([self._seed, which]).permutation(size)
            taken.append(self._prompts[int(orders[which][number % size])])
        return taken


def sample_requests(
    prompts: Sequence[Prompt], samples_per_prompt: int, *seed_parts: int | str
) -> list[SampleRequest]:
    """Make one request per sample, the samples of a prompt next to each other.

    Group estimators (RLOO, GRPO) rely on this order.
    """
    return [
        SampleRequest(position, prompt, derive_seed(*seed_parts, position))
        for position, prompt in enumerate(
            prompt for prompt in prompts for _ in range(samples_per_prompt)
        )
    ]


def shard_requests(
    samples: Sequence[SampleRequest], shard_size: int, version: int
) -> list[ShardRequest]:
    """Cut a batch into shards of consecutive positions; the last may be shorter."""
    return [
        ShardRequest(index, tuple(samples[first : first + shard_size]), version)
        for index, first in enumerate(range(0, len(samples), shard_size))
    ]


def num_rollouts(batch: Sequence[ScoredShard]) -> int:
    """Return the number of samples in a batch."""
    return sum(len(scored.shard.info.positions) for scored in batch)


def require_whole(batch: Sequence[ScoredShard], batch_size: int, version: int) -> None:
    """Check that a batch has each sample once, and all of the current policy version.

    Raises:
        RlhfError: a sample is missing, duplicated, or of another version.
    """
    positions = sorted(position for scored in batch for position in scored.shard.info.positions)
    if positions != list(range(batch_size)):
        raise RlhfError(
            f"The batch holds {len(positions)} samples ({len(set(positions))} distinct) where "
            f"{batch_size} were requested: a shard was lost or arrived twice"
        )
    stale = {v for scored in batch for v in scored.shard.info.versions} - {version}
    if stale:
        raise RlhfError(
            f"The batch holds samples of versions {sorted(stale)}, {version} is current"
        )


def require_all_learnt(report: StepReport, num_samples: int) -> None:
    """Check that a learner group has learnt every sample once.

    Raises:
        RlhfError: it learnt fewer or more.
    """
    if report.samples_learnt != num_samples:
        raise RlhfError(
            f"A learner group learnt {report.samples_learnt} of the {num_samples} samples that "
            "were generated: its ranks did not share the batch out once"
        )
