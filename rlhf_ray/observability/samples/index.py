"""The index of recorded samples: a fixed-size row of numbers for each line of texts.

``completions.index`` begins with a line of JSON, ``{"format": 1, "sources": [...]}``; the rows
follow, in the order of the lines in ``completions.jsonl``, which is that of iteration and position.
It can be made again from the texts at any time.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_ray.observability.sinks import record_of

TEXTS, INDEX = "completions.jsonl", "completions.index"
FORMAT = 1
_HEADER_BYTES = 65536
"""Most bytes of the first line."""
STOPPED, HAS_TOKENS = 1, 2
"""Bits of ``flags``."""
NUMBERS = ("iteration", "version", "position", "length")
SCORES = ("score", "kl", "mismatch", "distinct_bigrams")


def row_type(num_sources: int) -> np.dtype[np.void]:
    """Return the type of a row: little-endian, without padding; a missing number is NaN."""
    return np.dtype(
        [
            *((name, "<u4") for name in NUMBERS),
            ("offset", "<u8"),
            ("size", "<u4"),
            ("prompt", "<u8"),
            *((name, "<f4") for name in SCORES),
            ("flags", "u1"),
            ("sources", "<f4", (num_sources,)),
        ]
    )


def header(sources: Sequence[str]) -> bytes:
    """Return the first line of an index."""
    return json.dumps({"format": FORMAT, "sources": [*sources]}).encode() + b"\n"


def read_header(path: Path) -> tuple[list[str], int] | None:
    """Return the names of the reward sources and where the rows begin; None if it has no header.

    A missing file has none.
    """
    try:
        with path.open("rb") as file:
            line = file.readline(_HEADER_BYTES)
    except FileNotFoundError:
        return None
    record = record_of(line.decode(errors="replace")) if line.endswith(b"\n") else None
    if record is None or record.get("format") != FORMAT:
        return None
    return [str(name) for name in record.get("sources") or ()], len(line)


def prompt_key(text: str) -> int:
    """Return the number by which the index knows a prompt: 64 bits of its text's BLAKE2."""
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def row_of(record: Mapping[str, Any], offset: int, size: int, sources: Sequence[str]) -> bytes:
    """Return the index's row of a record, whose line has ``size`` bytes from ``offset`` on.

    Raises:
        ValueError: the record is damaged: its numbers are none.
    """
    row = np.zeros((), row_type(len(sources)))
    try:
        for name in NUMBERS:
            row[name] = min(max(int(record.get(name) or 0), 0), 2**32 - 1)
        for name in SCORES:
            row[name] = _number(record.get(name))
        scores = record.get("scores") or {}
        row["sources"] = [_number(scores.get(name)) for name in sources]
        row["prompt"] = prompt_key(str(record.get("prompt", "")))
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"a sample's numbers are none: {error}") from error
    stopped = STOPPED if record.get("finish_reason") == "stop" else 0
    row["flags"] = stopped | (HAS_TOKENS if record.get("tokens") else 0)
    row["offset"], row["size"] = offset, size
    return row.tobytes()


def rows_of_texts(path: Path, sources: Sequence[str]) -> Iterator[bytes]:
    """Yield the index's rows of a file of texts, without lines that hold no sample.

    A missing file has none.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    offset = 0
    with file:
        for line in file:
            record = record_of(line.decode(errors="replace")) if line.endswith(b"\n") else None
            if record is not None:
                with suppress(ValueError):
                    yield row_of(record, offset, len(line), sources)
            offset += len(line)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    return float(value)
