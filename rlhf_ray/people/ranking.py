"""People at work on a run's pairs: what each is shown next, what they answer and take back."""

import random
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_ray.errors import DataError
from rlhf_ray.people.agreement import Agreement, agreement, disputed
from rlhf_ray.people.pairs import Candidate, Pair, read_pairs
from rlhf_ray.people.preferences import (
    VERDICTS,
    Answer,
    Record,
    Undo,
    Verdict,
    append,
    preferences_path,
    read_preferences,
    standing,
)

LONGEST_NAME = 60
"""Characters of a person's name."""


@dataclass(frozen=True)
class Shown:
    """A pair as one person sees it."""

    pair: Pair
    left: Literal["first", "second"]
    """The answer that stands on the left: drawn for each person and pair, the same on reload."""
    is_disputed: bool = False
    """True if this person has answered it, and others differed since."""

    @property
    def sides(self) -> tuple[Candidate, Candidate]:
        """The answers on the left and on the right."""
        first, second = self.pair.first, self.pair.second
        return (first, second) if self.left == "first" else (second, first)


@dataclass(frozen=True)
class Standing:
    """How far the ranking of a run is."""

    num_pairs: int
    num_done: int
    """Pairs that this person answered."""
    num_answers: int
    """Standing answers of all people but skips."""
    people: dict[str, int]
    """Person -> standing answers."""
    num_disputed: int
    agreement: Agreement


class Ranking:
    """The pairs and verdicts of one run; safe to use from several threads.

    Raises:
        DataError: the file of pairs is damaged.
    """

    def __init__(self, run: Path) -> None:
        self._path = preferences_path(run)
        self._lock = threading.Lock()
        self.pairs = {pair.id: pair for pair in read_pairs(run)}
        self._num_bytes = self._size()  # before it is read: a verdict in between is seen later
        self.found = read_preferences(self._path)
        """What the file held at the start: `is_torn` and `num_bad` are to be reported."""
        self._records: list[Record] = list(self.found.records)

    def next(self, person: str) -> Shown | None:
        """Return the next pair for a person; None when nothing is left.

        First those that they have not answered, in the order of the file, then each disputed one
        once more.
        """
        with self._lock:
            self._read_others()
            mine = {a.pair.id for a in standing(self._records) if a.person == person}
            open_pairs = (pair for identity, pair in self.pairs.items() if identity not in mine)
            if (pair := next(open_pairs, None)) is not None:
                return self._shown(pair, person)
            for identity in self._disputed():
                if identity in mine and self._times_answered(person, identity) == 1:
                    return self._shown(self.pairs[identity], person, is_disputed=True)
            return None

    def answer(self, person: str, pair: str, verdict: Verdict) -> Answer:
        """Record a verdict; it is on disk when this returns.

        Raises:
            DataError: the person has no name, or there is no such pair or verdict.
            ConfigError: the disk is full.
        """
        if not person.strip() or not person.isprintable() or len(person) > LONGEST_NAME:
            raise DataError(f"A name has 1 to {LONGEST_NAME} printable characters; give another")
        if verdict not in VERDICTS:
            raise DataError(f"{verdict!r} is no verdict; choose one of {', '.join(VERDICTS)}")
        if pair not in self.pairs:
            raise DataError(f"This run has no pair {pair!r}; load the page again")
        shown = self._shown(self.pairs[pair], person)
        answer = Answer(person, shown.pair, shown.left, verdict)
        self._append(answer)
        return answer

    def undo(self, person: str) -> Shown | None:
        """Take back a person's last standing answer, and return its pair; None without one."""
        with self._lock:
            self._read_others()
            mine = [answer for answer in standing(self._records) if answer.person == person]
        if not mine:
            return None
        self._append(Undo(person, mine[-1].id))
        return self._shown(mine[-1].pair, person)

    def progress(self, person: str = "") -> Standing:
        """Return how far a person, and all of them, are."""
        with self._lock:
            self._read_others()
            answers = standing(self._records)
            num_disputed = len(self._disputed())
        names = [answer.person for answer in answers]
        return Standing(
            num_pairs=len(self.pairs),
            num_done=sum(a.person == person and a.pair.id in self.pairs for a in answers),
            num_answers=sum(answer.verdict != "skip" for answer in answers),
            people={name: names.count(name) for name in dict.fromkeys(names)},
            num_disputed=num_disputed,
            agreement=agreement(answers),
        )

    def disputed(self) -> list[Pair]:
        """Return the pairs on which people gave different verdicts."""
        with self._lock:
            self._read_others()
            return [self.pairs[identity] for identity in self._disputed()]

    def _disputed(self) -> list[str]:
        return [each for each in disputed(standing(self._records)) if each in self.pairs]

    def _times_answered(self, person: str, pair: str) -> int:
        undone = {record.undoes for record in self._records if isinstance(record, Undo)}
        answers = (r for r in self._records if isinstance(r, Answer) and r.id not in undone)
        return sum(answer.person == person and answer.pair.id == pair for answer in answers)

    def _append(self, record: Record) -> None:
        with self._lock:
            self._num_bytes += append(self._path, record)
            self._records.append(record)

    def _read_others(self) -> None:
        """Read the file again if another process has appended to it."""
        if (num_bytes := self._size()) != self._num_bytes:
            self._records = list(read_preferences(self._path).records)
            self._num_bytes = num_bytes

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0

    def _shown(self, pair: Pair, person: str, is_disputed: bool = False) -> Shown:
        is_first = random.Random(f"side:{pair.id}:{person}").random() < 0.5
        return Shown(pair, "first" if is_first else "second", is_disputed)
