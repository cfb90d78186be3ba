"""Preference pairs made of single answers with a label, liked or not."""

import json
import random
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from rlhf_ray.data.reading.counts import SkippedRows
from rlhf_ray.data.reading.rows import Row
from rlhf_ray.disk import large_files_folder


def pairs_by_prompt(
    rows: Iterable[Row | SkippedRows], max_pairs: int, seed: int
) -> Iterator[Row | SkippedRows]:
    """Pair every liked answer with every disliked one to the same prompt.

    Answers to a prompt may be anywhere in the dataset, so they are grouped in a table on disk.

    Args:
        rows: with a prompt, ``completion`` and ``label``; skipped ones pass through.
        max_pairs: if a prompt has more possible pairs, this many are drawn without replacement.
        seed: seed of the run; with the prompt it fixes the draw.

    Yields:
        Rows with ``chosen`` and ``rejected``, prompts in the order of their first answers; a prompt
        without a pair is skipped as ``prompt_without_pair``.
    """
    with (
        tempfile.TemporaryDirectory(prefix="pairs-", dir=large_files_folder()) as folder,
        closing(sqlite3.connect(Path(folder) / "answers.sqlite")) as table,
    ):
        table.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
            "CREATE TABLE answers (id INTEGER PRIMARY KEY, prompt, liked INTEGER, row);"
        )
        for row in rows:
            if isinstance(row, SkippedRows):
                yield row
                continue
            prompt = json.dumps([row.get("messages"), row.get("prompt"), row.get("tools")])
            values = (prompt, bool(row["label"]), json.dumps(row, default=str))
            table.execute("INSERT INTO answers (prompt, liked, row) VALUES (?, ?, ?)", values)
        table.execute("CREATE INDEX by_prompt ON answers (prompt, id)")
        prompts = table.execute("SELECT prompt FROM answers GROUP BY prompt ORDER BY min(id)")
        for (prompt,) in prompts:
            yield from _pairs(table, prompt, max_pairs, seed)


def _pairs(
    table: sqlite3.Connection, prompt: str, max_pairs: int, seed: int
) -> Iterator[Row | SkippedRows]:
    answers: dict[bool, list[dict[str, object]]] = {True: [], False: []}
    query = "SELECT liked, row FROM answers WHERE prompt = ? ORDER BY id"
    for liked, row in table.execute(query, (prompt,)):
        answers[bool(liked)].append(json.loads(row))
    possible = range(len(answers[True]) * len(answers[False]))
    if not possible:
        yield SkippedRows("prompt_without_pair", is_bad=False)
    pairs = possible
    if len(possible) > max_pairs:
        pairs = random.Random(f"pairs:{seed}:{prompt}").sample(possible, max_pairs)
    for index in pairs:
        liked_index, disliked_index = divmod(index, len(answers[False]))
        liked, disliked = answers[True][liked_index], answers[False][disliked_index]
        rest = {name: value for name, value in liked.items() if name not in ("completion", "label")}
        yield {**rest, "chosen": liked["completion"], "rejected": disliked["completion"]}
