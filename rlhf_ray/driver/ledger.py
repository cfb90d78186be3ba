"""The ledger of samples: each drawn position is learnt, discarded or in flight, and none twice.

    draw --> in flight --> arrived, each position once, of the version requested or a newer one
                              |
                              +--> learnt by every group, each position once --> settled
                              +--> or discarded by a rollback -----------------> settled

A position is a sample's index in its batch; batches are settled in the order of their index. What
is settled is counted, so that the ledger is as small as the batches in flight however long the run.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_ray.driver.checkpoint import RunState
from rlhf_ray.errors import LedgerError
from rlhf_ray.types import ShardInfo, StepReport

NUM_NAMED = 8
"""Largest number of positions that an error names."""


@dataclass(frozen=True, slots=True)
class Draw:
    """A batch that is drawn and not settled."""

    batch: int
    """Its index; that of the iteration which learns it."""
    first_prompt: int
    """Number of its first prompt in the endless sequence of prompts."""
    num_prompts: int
    num_samples: int
    version: int
    """Adapter version when it was drawn: none of its samples is from an older one."""

    @property
    def span(self) -> str:
        """Its positions, in words."""
        last = self.first_prompt + self.num_prompts - 1
        return (
            f"positions 0 to {self.num_samples - 1} (prompts {self.first_prompt} to {last} of the "
            "run)"
        )

    def named(self, what: str, positions: Iterable[int]) -> str:
        """Name what is wrong with some positions; an empty string if there are none."""
        known, samples = sorted(positions), self.num_samples // self.num_prompts
        named = [
            f"{position} (prompt {self.first_prompt + position // samples} of the run, sample "
            f"{position % samples})"
            for position in known[:NUM_NAMED]
        ]
        rest = f" and {len(known) - NUM_NAMED} more" if len(known) > NUM_NAMED else ""
        return f"{what}: {', '.join(named)}{rest}" if known else ""


class Ledger:
    """The account of all samples of a run."""

    def __init__(self, state: RunState) -> None:
        """Continue from a commit: what was in flight then is drawn again, at the same positions."""
        lost = sum(draw["num_samples"] for draw in state.in_flight)
        drawn = state.samples_generated if state.samples_drawn is None else state.samples_drawn
        self._drawn = drawn - lost
        self._learnt, self._discarded = state.samples_learnt, state.samples_set_aside
        self._next_prompt = state.prompts_drawn
        self._batch, self._version = state.iteration, state.version
        self._sampled_from = 0
        """Version that the last settled batch was sampled from."""
        self._in_flight: list[Draw] = []

    def draw(self, num_prompts: int, num_samples: int, version: int) -> Draw:
        """Draw the next batch, after those in flight."""
        last = self._in_flight[-1] if self._in_flight else None
        draw = Draw(
            batch=(last.batch if last else self._batch) + 1,
            first_prompt=last.first_prompt + last.num_prompts if last else self._next_prompt,
            num_prompts=num_prompts,
            num_samples=num_samples,
            version=version,
        )
        if version < (newest := last.version if last else self._sampled_from):
            raise LedgerError(
                f"Batch {draw.batch}, {draw.span}, would be sampled from version {version}, but "
                f"the batch before it from {newest}"
            )
        self._in_flight.append(draw)
        self._drawn += num_samples
        return draw

    @property
    def num_in_flight(self) -> int:
        """Number of batches that are drawn and not settled."""
        return len(self._in_flight)

    @property
    def next_in_flight(self) -> Draw:
        """The batch to settle next."""
        return self._in_flight[0]

    def arrived(self, draw: Draw, shards: Sequence[ShardInfo]) -> None:
        """Check that a batch has arrived: each position once, of a version since it was drawn.

        Raises:
            LedgerError: a position is missing, there twice, unknown, or of another version.
        """
        held = Counter(position for shard in shards for position in shard.positions)
        if wrong := _wrong(held, draw):
            raise LedgerError(
                f"The batch holds {held.total()} samples ({len(held)} distinct) where "
                f"{draw.num_samples} were requested: a shard was lost or arrived twice. {wrong}"
            )
        stale = {
            position: version
            for shard in shards
            for position, version in zip(shard.positions, shard.versions, strict=True)
            if not draw.version <= version <= self._version
        }
        if stale:
            raise LedgerError(
                f"The batch holds samples of versions {sorted(set(stale.values()))}, "
                f"{self._version} is current. Batch {draw.batch}: {draw.named('stale', stale)}"
            )

    def learnt(self, draw: Draw, reports: Mapping[str, StepReport]) -> None:
        """Check that every learner group has learnt each position of a batch once.

        Raises:
            LedgerError: a group's ranks left a position out, or learnt it twice.
        """
        for group, report in reports.items():
            if wrong := _wrong(Counter(report.positions), draw):
                raise LedgerError(
                    f"The {group} learnt {len(report.positions)} of the {draw.num_samples} samples "
                    f"that were generated: its ranks did not share the batch out once. {wrong}"
                )

    def settle(self, draw: Draw, version: int, *, is_learnt: bool) -> dict[str, Any]:
        """Close the oldest batch in flight as learnt or discarded; return what a commit keeps.

        Args:
            draw: the batch.
            version: the version that its commit makes.
            is_learnt: whether the commit holds what was learnt; else a rollback discarded it.

        Raises:
            LedgerError: it is not the oldest one, versions do not grow, or the sums differ.
        """
        if not self._in_flight or self._in_flight[0] != draw:
            expected = self._in_flight[0].batch if self._in_flight else "none"
            raise LedgerError(
                f"Batch {draw.batch}, {draw.span}, is to be "
                f"{'learnt' if is_learnt else 'discarded'}; the next one in flight is {expected}"
            )
        if version <= self._version:
            raise LedgerError(
                f"Batch {draw.batch}, {draw.span}, ends in version {version}, but version "
                f"{self._version} was committed already"
            )
        self._in_flight.pop(0)
        self._batch, self._version, self._sampled_from = draw.batch, version, draw.version
        self._next_prompt = draw.first_prompt + draw.num_prompts
        if is_learnt:
            self._learnt += draw.num_samples
        else:
            self._discarded += draw.num_samples
        self._require_balanced()
        return {
            "prompts_drawn": self._next_prompt,
            "samples_drawn": self._drawn,
            "samples_generated": self._learnt + self._discarded,
            "samples_learnt": self._learnt,
            "samples_set_aside": self._discarded,
            "in_flight": [asdict(draw) for draw in self._in_flight],
        }

    def counts(self) -> dict[str, int]:
        """Return the numbers of samples for the summary; at the end of a run none is in flight."""
        self._require_balanced()
        return {
            "drawn": self._drawn,
            "learnt": self._learnt,
            "discarded": self._discarded,
            "in_flight": sum(draw.num_samples for draw in self._in_flight),
        }

    def _require_balanced(self) -> None:
        in_flight = sum(draw.num_samples for draw in self._in_flight)
        if self._drawn != self._learnt + self._discarded + in_flight:
            batches = "; ".join(f"batch {draw.batch}, {draw.span}" for draw in self._in_flight)
            raise LedgerError(
                f"After batch {self._batch} (prompts up to number {self._next_prompt}) "
                f"{self._drawn} samples were drawn, but {self._learnt} learnt, {self._discarded} "
                f"discarded and {in_flight} in flight: {batches or 'no batch'}"
            )


def _wrong(held: Counter[int], draw: Draw) -> str:
    """Name the positions that are not there exactly once; an empty string if there are none."""
    positions = range(draw.num_samples)
    found = (
        draw.named("missing", [position for position in positions if position not in held]),
        draw.named("more than once", [position for position in held if held[position] > 1]),
        draw.named("never drawn", [position for position in held if position not in positions]),
    )
    said = "; ".join(filter(None, found))
    return f"Batch {draw.batch}: {said}" if said else ""
