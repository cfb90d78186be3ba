"""Counts of the rows that a loader kept and dropped, and the point at which it stops."""

from collections import Counter

from rlhf_ray.errors import DataError


class BadRow(Exception):
    """One row cannot be used; whoever reads rows counts it.

    Args:
        reason: one word, for the counts.
        why: a clause for the message that a person reads where too many rows are bad.
    """

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(reason, why)
        self.reason = reason
        self.why = why


class RowTally:
    """Single bad rows are counted and reported; too many of them end the stage.

    Args:
        name: the data set, for messages.
        max_bad_share: share of bad rows, in [0, 1], above which `finish` raises.
    """

    def __init__(self, name: str, max_bad_share: float) -> None:
        self.name = name
        self.max_bad_share = max_bad_share
        self._num_kept = 0
        self._bad: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()
        self._why: dict[str, str] = {}

    def keep(self, num: int = 1) -> None:
        """Count good rows."""
        self._num_kept += num

    def drop_bad(self, reason: str, num: int = 1) -> None:
        """Count rows that are wrong in themselves."""
        if num:
            self._bad[reason] += num

    def drop_row(self, row: BadRow, num: int = 1) -> None:
        """Count rows that could not be used."""
        self.drop_bad(row.reason, num)
        if row.why:
            self._why.setdefault(row.reason, row.why)

    def drop_unused(self, reason: str, num: int = 1) -> None:
        """Count good rows that have no place here, such as repeated prompts."""
        if num:
            self._unused[reason] += num

    @property
    def dropped(self) -> dict[str, int]:
        """Rows left out, by reason."""
        return dict(sorted((self._bad + self._unused).items()))

    def finish(self) -> dict[str, int]:
        """Counts of the whole set: ``kept``, and each reason for which rows were dropped.

        Raises:
            DataError: more than the allowed share is bad, or nothing is left.
        """
        num_bad = self._bad.total()
        num_rows = self._num_kept + num_bad + self._unused.total()
        reasons = ", ".join(f"{reason}: {num}" for reason, num in self.dropped.items()) or "none"
        told = "".join(f". {reason}: {why}" for reason, why in self._why.items())
        if num_bad > self.max_bad_share * num_rows:
            remedy = "clean the data, or raise that share"
            if "overlong" in self._bad:
                remedy += ", or raise the length limit, or set data.overlong to truncate"
            raise DataError(
                f"{self.name}: {num_bad} of {num_rows} rows are bad ({reasons}), more than the "
                f"{self.max_bad_share:.0%} that data.max_bad_share allows; {remedy}{told}"
            )
        if not self._num_kept:
            raise DataError(
                f"{self.name}: none of {num_rows} rows can be used (dropped: {reasons}); give "
                f"other data{told}"
            )
        return {"kept": self._num_kept, **self.dropped}
