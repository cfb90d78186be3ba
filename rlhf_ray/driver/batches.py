"""Which prompts an iteration learns from, with which seeds: functions of the iteration alone."""

import hashlib
from collections.abc import Sequence

import numpy as np

from rlhf_ray.errors import RlhfError
from rlhf_ray.types import Prompt, SampleRequest, ScoredShard, ShardRequest, StepReport


def derive_seed(*parts: int | str) -> int:
    """A 31-bit seed from what a sample is, never from who generates it."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") & 0x7FFF_FFFF


class PromptCursor:
    """Goes through the prompts in passes, each shuffled by (run seed, pass)."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self._prompts = prompts
        self._seed = seed

    def __len__(self) -> int:
        """Prompts of a pass."""
        return len(self._prompts)

    def take(self, first: int, count: int) -> list[Prompt]:
        """Prompts number ``first`` to ``first + count`` of the endless sequence."""
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
    """One request a sample; the samples of a prompt stand next to each other."""
    return [
        SampleRequest(position, prompt, derive_seed(*seed_parts, position))
        for position, prompt in enumerate(
            prompt for prompt in prompts for _ in range(samples_per_prompt)
        )
    ]


def shard_requests(
    samples: Sequence[SampleRequest], shard_size: int, version: int
) -> list[ShardRequest]:
    """Cut a batch into fixed runs of positions; the last may be shorter."""
    return [
        ShardRequest(index, tuple(samples[first : first + shard_size]), version)
        for index, first in enumerate(range(0, len(samples), shard_size))
    ]


def num_rollouts(batch: Sequence[ScoredShard]) -> int:
    """Samples of a batch."""
    return sum(len(scored.shard.info.positions) for scored in batch)


def require_whole(batch: Sequence[ScoredShard], batch_size: int, version: int) -> None:
    """A sample is never lost or learnt twice, and each is of the current policy.

    Raises:
        RlhfError: a sample is missing, there twice, or of another version.
    """
    positions = sorted(position for scored in batch for position in scored.shard.info.positions)
    if positions != list(range(batch_size)):
        raise RlhfError(
            f"The batch holds {len(positions)} samples ({len(set(positions))} distinct) where "
            f"{batch_size} were asked for: a shard was lost or came twice"
        )
    stale = {v for scored in batch for v in scored.shard.info.versions} - {version}
    if stale:
        raise RlhfError(
            f"The batch holds samples of versions {sorted(stale)}, {version} is current"
        )


def require_all_learnt(report: StepReport, num_samples: int) -> None:
    """Every sample is learnt once.

    Raises:
        RlhfError: a group learnt fewer, or more.
    """
    if report.samples_learnt != num_samples:
        raise RlhfError(
            f"A learner group learnt {report.samples_learnt} of the {num_samples} samples that "
            "were generated: its ranks did not share the batch out once"
        )
