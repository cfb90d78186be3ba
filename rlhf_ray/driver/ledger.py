"""The ledger of samples: each drawn position is learnt, discarded, filtered or in flight, once.

    draw --> in flight --> arrived, each position once, of the version requested or a newer one
               ^              |
               +-- refill <-- +--> filtered: the next prompts take their place
                              +--> learnt by every group, each position once --> settled
                              +--> or discarded by a rollback -----------------> settled

A position is a sample's index in its batch, of which a refill adds further ones; batches are
settled in the order of their index. What is settled is counted, so that the ledger is as small as
the batches in flight however long the run.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
    prompts: tuple[int, ...]
    """Numbers of its prompts in the endless sequence of prompts, in the order of its positions."""
    num_samples: int
    """Number of its positions, the filtered ones included."""
    version: int
    """Adapter version when it was drawn: none of its samples is from an older one."""
    filtered: tuple[int, ...] = ()
    """Positions that a refill has replaced: they are not learnt."""

    @property
    def num_kept(self) -> int:
        """Number of samples that are learnt or discarded: that of a batch."""
        return self.num_samples - len(self.filtered)

    @property
    def samples_per_prompt(self) -> int:
        """Number of samples of each prompt."""
        return self.num_samples // len(self.prompts)

    @property
    def span(self) -> str:
        """Its positions, in words."""
        return f"positions 0 to {self.num_samples - 1} (prompts {_runs(self.prompts)} of the run)"

    def named(self, what: str, positions: Iterable[int]) -> str:
        """Name what is wrong with some positions; an empty string if there are none."""
        known = sorted(positions)
        named = [self._named(position) for position in known[:NUM_NAMED]]
        rest = f" and {len(known) - NUM_NAMED} more" if len(known) > NUM_NAMED else ""
        return f"{what}: {', '.join(named)}{rest}" if known else ""

    def _named(self, position: int) -> str:
        if position not in range(self.num_samples):
            return str(position)
        index, sample = divmod(position, self.samples_per_prompt)
        return f"{position} (prompt {self.prompts[index]} of the run, sample {sample})"


class Ledger:
    """The account of all samples of a run."""

    def __init__(self, state: RunState) -> None:
        """Continue from a commit: what was in flight then is drawn again, at the same positions."""
        lost = sum(draw["num_samples"] for draw in state.in_flight)
        drawn = state.samples_generated if state.samples_drawn is None else state.samples_drawn
        self._drawn = drawn - lost
        self._learnt, self._discarded = state.samples_learnt, state.samples_set_aside
        self._filtered = state.samples_filtered
        self._num_prompts = state.prompts_drawn
        """Number of prompts in settled batches."""
        in_flight = [number for draw in state.in_flight for number in _prompts(draw)]
        self._returned = sorted([*state.prompts_returned, *in_flight])
        """Prompts that were drawn and neither settled nor in flight, in order: the next ones."""
        self._next_prompt = self._num_prompts + len(self._returned)
        """The first prompt that was never drawn."""
        self._batch, self._version = state.iteration, state.version
        self._sampled_from = 0
        """Version that the last settled batch was sampled from."""
        self._in_flight: list[Draw] = []

    def draw(self, num_prompts: int, num_samples: int, version: int) -> Draw:
        """Draw the next batch, after those in flight."""
        last = self._in_flight[-1] if self._in_flight else None
        draw = Draw(
            batch=(last.batch if last else self._batch) + 1,
            prompts=self._take(num_prompts),
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

    def refill(self, draw: Draw, filtered: Collection[int]) -> Draw:
        """Draw prompts in place of some positions of a batch, all those of their prompts.

        Returns:
            The batch, with as many positions more; as many are left to be learnt.
        """
        prompts = self._take(len(filtered) // draw.samples_per_prompt)
        self._drawn += len(filtered)
        refilled = replace(
            draw,
            prompts=draw.prompts + prompts,
            num_samples=draw.num_samples + len(filtered),
            filtered=tuple(sorted({*draw.filtered, *filtered})),
        )
        return self._replaced(draw, refilled)

    def empty(self, draw: Draw) -> Draw:
        """Return the prompts of a batch's refills, which is sampled again; they are the next."""
        num_first = draw.num_kept // draw.samples_per_prompt
        self._returned = sorted([*self._returned, *draw.prompts[num_first:]])
        self._drawn -= len(draw.filtered)
        first = replace(
            draw, prompts=draw.prompts[:num_first], num_samples=draw.num_kept, filtered=()
        )
        return self._replaced(draw, first)

    def _take(self, num: int) -> tuple[int, ...]:
        """Take the next prompts: those that were returned, then those never drawn."""
        again, self._returned = self._returned[:num], self._returned[num:]
        first, self._next_prompt = self._next_prompt, self._next_prompt + num - len(again)
        return (*again, *range(first, self._next_prompt))

    def _replaced(self, draw: Draw, by: Draw) -> Draw:
        self._in_flight[self._in_flight.index(draw)] = by
        return by

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
                f"{draw.num_kept} were requested: a shard was lost or arrived twice. {wrong}"
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
                    f"The {group} learnt {len(report.positions)} of the {draw.num_kept} samples "
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
        self._num_prompts += len(draw.prompts)
        self._filtered += len(draw.filtered)
        if is_learnt:
            self._learnt += draw.num_kept
        else:
            self._discarded += draw.num_kept
        self._require_balanced()
        return {
            "prompts_drawn": self._num_prompts,
            "prompts_returned": tuple(self._returned),
            "samples_drawn": self._drawn,
            "samples_generated": self._learnt + self._discarded + self._filtered,
            "samples_learnt": self._learnt,
            "samples_set_aside": self._discarded,
            "samples_filtered": self._filtered,
            "in_flight": [asdict(draw) for draw in self._in_flight],
        }

    def counts(self) -> dict[str, int]:
        """Return the numbers of samples for the summary; at the end of a run none is in flight."""
        self._require_balanced()
        return {
            "drawn": self._drawn,
            "learnt": self._learnt,
            "discarded": self._discarded,
            "filtered": self._filtered,
            "in_flight": sum(draw.num_samples for draw in self._in_flight),
        }

    def _require_balanced(self) -> None:
        in_flight = sum(draw.num_samples for draw in self._in_flight)
        if self._drawn != self._learnt + self._discarded + self._filtered + in_flight:
            batches = "; ".join(f"batch {draw.batch}, {draw.span}" for draw in self._in_flight)
            raise LedgerError(
                f"After batch {self._batch} ({self._num_prompts} prompts) {self._drawn} samples "
                f"were drawn, but {self._learnt} learnt, {self._discarded} discarded, "
                f"{self._filtered} filtered and {in_flight} in flight: {batches or 'no batch'}"
            )


def _prompts(draw: Mapping[str, Any]) -> Iterable[int]:
    """Return the prompts of a saved draw; older versions saved the first and their number."""
    first = draw.get("first_prompt", 0)
    return draw.get("prompts", range(first, first + draw.get("num_prompts", 0)))


def _wrong(held: Counter[int], draw: Draw) -> str:
    """Name the positions that are not there exactly once; an empty string if there are none."""
    positions = {*range(draw.num_samples)}.difference(draw.filtered)
    found = (
        draw.named("missing", positions.difference(held)),
        draw.named("more than once", [position for position in held if held[position] > 1]),
        draw.named("filtered", held.keys() & {*draw.filtered}),
        draw.named("never drawn", [each for each in held if each not in range(draw.num_samples)]),
    )
    said = "; ".join(filter(None, found))
    return f"Batch {draw.batch}: {said}" if said else ""


def _runs(numbers: Sequence[int]) -> str:
    """Name numbers by their runs."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][-1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first} to {last}" for first, last in runs)
