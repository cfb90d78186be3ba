"""Counts of the rows that a loader keeps and drops, and the share of bad rows that it accepts."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ray.errors import DataError

_SHORTER = "raise the length limit, or set data.overlong to truncate"


class BadRow(Exception):
    """One row cannot be used; the code that reads the rows catches this and counts it.

    Args:
        reason: short name for the counts, such as ``no_answer``.
        explanation: a clause for the error message when too many rows are bad.
    """

    def __init__(self, reason: str, explanation: str = "") -> None:
        super().__init__(reason, explanation)
        self.reason = reason
        self.explanation = explanation


@dataclass(frozen=True)
class SkippedRows:
    """Stands in a stream of rows for rows that are left out, so that they are still counted."""

    reason: str
    """Short name for the counts."""
    is_bad: bool
    """True: wrong in themselves. False: good, but of no use here, such as filtered rows."""
    explanation: str = ""
    """As in `BadRow`."""
    num: int = 1
    """Number of rows."""


class RowTally:
    """Counts rows; a few bad ones are reported, too many end the stage."""

    def __init__(self, name: str, max_bad_share: float) -> None:
        self.name = name
        self.max_bad_share = max_bad_share
        self._num_kept = 0
        self._bad: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()
        self._explanations: dict[str, str] = {}

    def keep(self, num: int = 1) -> None:
        """Count good rows."""
        self._num_kept += num

    def note(self, what: str) -> None:
        """Count a kept row with something to know about it; the count is named ``kept_<what>``."""
        self._notes[f"kept_{what}"] += 1

    def drop_bad(self, reason: str, num: int = 1, explanation: str = "") -> None:
        """Count rows that are wrong in themselves."""
        if num:
            self._bad[reason] += num
        if explanation:
            self._explanations.setdefault(reason, explanation)

    def drop_unused(self, reason: str, num: int = 1) -> None:
        """Count good rows that are of no use here, such as repeated prompts."""
        if num:
            self._unused[reason] += num

    def drop_row(self, row: BadRow) -> None:
        """Count a row that raised `BadRow`."""
        self.drop_bad(row.reason, explanation=row.explanation)

    def state(self) -> dict[str, dict[str, Any]]:
        """Return the counts as plain values, for a tally that `add`s them."""
        return {
            "kept": {"": self._num_kept},
            "bad": dict(self._bad),
            "unused": dict(self._unused),
            "notes": dict(self._notes),
            "explanations": self._explanations,
        }

    def add(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the counts of another tally, as its `state` returned them."""
        self._num_kept += state["kept"][""]
        self._bad.update(state["bad"])
        self._unused.update(state["unused"])
        self._notes.update(state["notes"])
        self._explanations |= state["explanations"]

    def skip(self, rows: SkippedRows) -> None:
        """Count rows that a reader left out."""
        if rows.is_bad:
            self.drop_bad(rows.reason, rows.num, rows.explanation)
        else:
            self.drop_unused(rows.reason, rows.num)

    @property
    def dropped(self) -> dict[str, int]:
        """Number of rows left out, by reason."""
        return dict(sorted((self._bad + self._unused).items()))

    @property
    def num_rows(self) -> int:
        """Number of rows counted so far."""
        return self._num_kept + self._bad.total() + self._unused.total()

    def finish(self, is_part: bool = False) -> dict[str, int]:
        """Return the counts of a set: ``kept``, dropped rows by reason, and notes.

        Args:
            is_part: more rows may follow, so none need be kept yet.

        Raises:
            DataError: more than the allowed share is bad, or nothing is left.
        """
        num_bad = self._bad.total()
        num_rows = self.num_rows
        details = "".join(f". {name}: {text}" for name, text in self._explanations.items())
        if num_bad > self.max_bad_share * num_rows:
            remedy = "fix the data, or raise data.max_bad_share"
            if "overlong" in self._bad:
                remedy += f", or {_SHORTER}"
            raise DataError(
                f"{self.name}: {num_bad} of {num_rows} rows are bad ({_listed(self._bad)}), more "
                f"than the {self.max_bad_share:.0%} that data.max_bad_share allows; "
                f"{remedy}{details}"
            )
        if not (num_rows or is_part):
            raise DataError(f"{self.name}: none of 0 rows can be used; give a dataset with rows")
        if not (self._num_kept or is_part):
            remedy = "check the dataset's columns and filters, or give another dataset"
            if "overlong" in self.dropped:
                remedy += f", or {_SHORTER}"
            raise DataError(
                f"{self.name}: none of {num_rows} rows can be used (dropped: "
                f"{_listed(self.dropped)}); {remedy}{details}"
            )
        return {"kept": self._num_kept, **self.dropped, **self._notes}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason}: {num}" for reason, num in sorted(counts.items())) or "none"
