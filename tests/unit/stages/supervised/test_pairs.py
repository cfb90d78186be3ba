"""Rows that the stages on pairs train on, and those that they hold out."""

import json
from pathlib import Path

from rlhf_ray.config import resolve
from rlhf_ray.data.reading.counts import RowTally
from rlhf_ray.data.reading.rows import StoredRows, batches
from rlhf_ray.stages.supervised.pairs import _pair_rows
from rlhf_ray.stages.supervised.reward import RewardTraining
from rlhf_ray.stages.supervised.training import HELD_OUT, TRAIN


def counted(rows: StoredRows) -> tuple[int, dict[str, int]]:
    """Rows that can be used, and the others by reason."""
    tally = RowTally("pairs", 1.0)
    return sum(map(len, batches(rows, tally))), tally.dropped


BAD = [{"prompt": "q", "chosen": "", "rejected": "b"}] * 10


def parts_of(folder: Path, rows: list[dict[str, str]]) -> dict[str, tuple[int, dict[str, int]]]:
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = resolve(
        {"data": {"preferences": {"path": str(data)}}, "reward": {"max_pairs": 30, "eval_rows": 2}}
    )
    found = _pair_rows(RewardTraining(config, folder, ""))
    return {part: counted(rows) for part, rows in found.items()}


def test_training_and_held_out_parts_contain_usable_rows_only(tmp_path: Path) -> None:
    good = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(40)]
    assert parts_of(tmp_path, [*good, *BAD]) == {
        TRAIN: (30, {"empty": 10, "over_max_pairs": 8}),
        HELD_OUT: (2, {}),
    }


def test_without_usable_rows_both_parts_are_empty(tmp_path: Path) -> None:
    assert parts_of(tmp_path, BAD) == {TRAIN: (0, {"empty": 10}), HELD_OUT: (0, {})}
