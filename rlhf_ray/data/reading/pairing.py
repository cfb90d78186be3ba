"""Pairs made of single answers that people liked or did not."""

import json
import random
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from rlhf_ray.data.reading.rows import Row


def pairs_by_prompt(rows: Iterable[Row], max_pairs: int, seed: int) -> Iterator[Row]:
    """Every liked answer against every disliked one to the same prompt.

    Answers to one prompt may lie anywhere, so they are grouped in a table on disk.

    Args:
        rows: with a prompt, ``completion`` and ``label``; rows marked as bad pass through.
        max_pairs: above this many possible pairs of a prompt, this many are drawn without
            replacement.
        seed: seed of the run; with the prompt it fixes the draw.

    Yields:
        Rows with ``chosen`` and ``rejected``, prompts in the order of their first answers; a prompt
        without a pair comes out as ``{"_unused": "prompt_without_pair"}``.
    """
    with (
        tempfile.TemporaryDirectory(prefix="pairs-") as folder,
        closing(sqlite3.connect(Path(folder) / "answers.sqlite")) as table,
    ):
        table.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE answers (id INTEGER PRIMARY KEY, prompt, liked INTEGER, row);"
        )
        for row in rows:
            if "_bad" in row:
                yield row
                continue
            values = (_key(row), bool(row["label"]), json.dumps(row, default=str))
            table.execute("INSERT INTO answers (prompt, liked, row) VALUES (?, ?, ?)", values)
        table.execute("CREATE INDEX by_prompt ON answers (prompt, id)")
        prompts = table.execute("SELECT prompt FROM answers GROUP BY prompt ORDER BY min(id)")
        for (prompt,) in prompts:
            yield from _pairs(table, prompt, max_pairs, seed)


def _pairs(table: sqlite3.Connection, prompt: str, max_pairs: int, seed: int) -> Iterator[Row]:
    answers: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    found = table.execute("SELECT liked, row FROM answers WHERE prompt = ? ORDER BY id", (prompt,))
    for liked, row in found:
        answers[bool(liked)].append(json.loads(row))
    possible = range(len(answers[True]) * len(answers[False]))
    if not possible:
        yield {"_unused": "prompt_without_pair"}
    if len(possible) > max_pairs:
        chosen = random.Random(f"pairs:{seed}:{prompt}").sample(possible, max_pairs)
    else:
        chosen = list(possible)
    for place in chosen:
        one, other = divmod(place, len(answers[False]))
        liked, disliked = answers[True][one], answers[False][other]
        rest = {name: value for name, value in liked.items() if name not in ("completion", "label")}
        yield {**rest, "chosen": liked["completion"], "rejected": disliked["completion"]}


def _key(row: Row) -> str:
    return json.dumps([row.get("messages"), row.get("prompt")])
