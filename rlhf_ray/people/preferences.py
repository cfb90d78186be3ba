"""The verdicts of people: a line each in preferences.jsonl, durable before it counts.

A line is an `Answer` with all that was on the page, so that it can be used where pairs and models
are gone, or an `Undo`. Nothing is ever rewritten. What counts is each person's last answer to each
pair that they did not take back.
"""

import json
import os
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf_ray.disk import DAMAGE, unwritable_is_an_error
from rlhf_ray.people.pairs import FOLDER, Candidate, Pair

PREFERENCES = "preferences.jsonl"

Verdict = Literal["left", "right", "tie", "both_bad", "skip"]
Preferred = Literal["first", "second", "tie", "both_bad", "skip"]
"""A verdict by the pair's order, which is the same for everybody."""
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


def _new_id() -> str:
    return uuid.uuid4().hex[:16]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True)
class Answer:
    """One person's verdict on one pair, with everything that was shown."""

    person: str
    pair: Pair
    left: Literal["first", "second"]
    """The answer that stood on the left."""
    verdict: Verdict
    id: str = field(default_factory=_new_id)
    time: str = field(default_factory=_now)
    """UTC, ISO 8601."""

    @property
    def preferred(self) -> Preferred:
        """The verdict by the pair's order."""
        if self.verdict not in ("left", "right"):
            return self.verdict
        is_first = (self.left == "first") == (self.verdict == "left")
        return "first" if is_first else "second"


@dataclass(frozen=True)
class Undo:
    """A person's withdrawal of an answer."""

    person: str
    undoes: str
    """Id of the answer."""
    id: str = field(default_factory=_new_id)
    time: str = field(default_factory=_now)


Record = Answer | Undo


@dataclass(frozen=True)
class Preferences:
    """What a file of verdicts holds."""

    records: Sequence[Record] = ()
    """In the order in which they were given."""
    is_torn: bool = False
    """Whether the last line ends in the middle: its writer was killed before it was confirmed."""
    num_bad: int = 0
    """Other lines that are no record."""

    def standing(self) -> list[Answer]:
        """Return each person's last answer to each pair that was not undone, oldest first."""
        return standing(self.records)


def standing(records: Iterable[Record]) -> list[Answer]:
    """Return each person's last answer to each pair that was not undone, oldest first.

    An undone answer uncovers the person's earlier one to the same pair.
    """
    answers: dict[str, Answer] = {}
    for record in records:
        if isinstance(record, Answer):
            answers[record.id] = record
        elif record.undoes in answers and answers[record.undoes].person == record.person:
            del answers[record.undoes]
    last = {(answer.person, answer.pair.id): answer.id for answer in answers.values()}
    kept = set(last.values())
    return [answer for answer in answers.values() if answer.id in kept]


def preferences_path(run: Path) -> Path:
    """Return the file of a run's verdicts."""
    return run / FOLDER / PREFERENCES


def append(path: Path, record: Record) -> int:
    """Append a record, and return its bytes; neither kill nor power failure loses it then.

    Several processes may append to one file. After a torn line a new one is begun.

    Raises:
        ConfigError: it cannot be written; it does not count then.
    """
    with unwritable_is_an_error(path):
        is_new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            is_torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            line = "\n" * is_torn + json.dumps(asdict(record)) + "\n"
            rest = line.encode()
            num_bytes = len(rest)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            _sync_folder(path.parent)
        return num_bytes


def _sync_folder(folder: Path) -> None:
    """Make the name of a new file durable too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_preferences(path: Path) -> Preferences:
    """Read verdicts; a missing file holds none.

    A line that is no record is counted, and the others are read.
    """
    if not path.exists():
        return Preferences()
    *lines, last = path.read_bytes().split(b"\n")
    records = [_record(line) for line in lines if line.strip()]
    whole = [record for record in records if record is not None]
    # Without its newline a line was not confirmed to anybody, even if it happens to be readable.
    return Preferences(whole, bool(last.strip()), len(records) - len(whole))


def _record(line: bytes) -> Record | None:
    try:
        row = json.loads(line)
        if "undoes" in row:
            return Undo(**row)
        if row["verdict"] not in VERDICTS or row["left"] not in ("first", "second"):
            return None
        return Answer(**{**row, "pair": _shown(row["pair"])})
    except (*DAMAGE, UnicodeDecodeError):
        return None


def _shown(row: Mapping[str, Any]) -> Pair:
    sides = {side: Candidate(**row[side]) for side in ("first", "second")}
    if not all(isinstance(side.text, str) for side in sides.values()):
        raise ValueError("an answer without text")
    return Pair(**{**row, **sides})


def holds_preferences(path: Path) -> bool:
    """Return whether a file of JSON lines is one of verdicts, by its first line."""
    with path.open("rb") as file:
        first = file.readline()
    return b'"verdict"' in first and _record(first) is not None


def training_rows(path: Path) -> Iterator[dict[str, object]]:
    """Yield a row with ``chosen`` and ``rejected`` for each pair that most people decided alike.

    Ties, bad pairs and skips teach nothing, nor do pairs on which as many preferred the one as the
    other. A broken line comes out as an empty row, which the reader of rows counts as a bad one.
    """
    found = read_preferences(path)
    votes: dict[str, Counter[Preferred]] = {}
    pairs: dict[str, Pair] = {}
    for answer in found.standing():
        pairs[answer.pair.id] = answer.pair
        votes.setdefault(answer.pair.id, Counter())[answer.preferred] += 1
    for identity, pair in pairs.items():
        lead = votes[identity]["first"] - votes[identity]["second"]
        if lead:
            chosen, rejected = (pair.first, pair.second)[:: 1 if lead > 0 else -1]
            yield {**pair.fields, "chosen": chosen.text, "rejected": rejected.text}
    for _ in range(found.num_bad):
        yield {"prompt": "", "chosen": "", "rejected": ""}
