"""Rows of data written to a file and read as loaders see them."""

import json
from pathlib import Path
from typing import Any

from rlhf_ray.config.data import DataSource
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.formats import Use
from rlhf_ray.data.reading.rows import batches
from rlhf_ray.data.reading.sources import load_rows

Rows = list[dict[str, Any]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(folder: Path, rows: Rows, use: Use, form: str = "auto") -> tuple[Rows, dict[str, int]]:
    """Return these rows as loaders see them, and the counts of those left out."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tally = RowTally("set", 1.0)
    table = load_rows([DataSource.model_validate({"path": str(path), "format": form})], use)
    found = [dict(row) for batch in batches(table, tally) for _, row in batch]
    return found, tally.dropped
