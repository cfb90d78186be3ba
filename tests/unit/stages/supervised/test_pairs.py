"""Rows that the stages on pairs train on, and those that they hold out."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import build_tiny

from rlhf_ray.config import resolve
from rlhf_ray.config.data import DataSource
from rlhf_ray.config.supervised import RewardConfig
from rlhf_ray.data.datasets import drawn_rows
from rlhf_ray.data.datasets.preferences import load_pairs
from rlhf_ray.data.reading.counts import RowTally, SkippedRows
from rlhf_ray.data.reading.rows import Row, StoredRows, batches, store_rows, unpack_row
from rlhf_ray.data.reading.sources import load_rows
from rlhf_ray.errors import DataError
from rlhf_ray.stages.supervised import pairs
from rlhf_ray.stages.supervised.pairs import _pair_rows, load_parts, split_rows
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


def test_one_pair_is_too_few(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"data\.preferences holds 1 usable row; at least 2 "):
        parts_of(tmp_path, [row])


def test_the_held_out_pairs_are_a_sample_with_prompts_of_their_own(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n // 4}", "chosen": "a", "rejected": f"b{n}"} for n in range(400)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def held_out(seed: int) -> list[str]:
        loaded = load_rows([DataSource(path=str(data))], "preferences")
        parts = split_rows(loaded, RewardConfig(eval_rows=20), seed)
        prompts = {part: [row["prompt"] for row in found.table] for part, found in parts.items()}
        assert set(prompts[TRAIN]).isdisjoint(prompts[HELD_OUT])
        assert len(prompts[HELD_OUT]) == 20
        return prompts[HELD_OUT]

    numbers = [int(prompt.removeprefix("q")) for prompt in held_out(0)]
    assert 20 < sum(numbers) / 20 < 80  # the newest would be 97
    assert held_out(0) == held_out(0)
    assert held_out(0) != held_out(1)


def test_without_usable_rows_both_parts_are_empty(tmp_path: Path) -> None:
    assert parts_of(tmp_path, BAD) == {TRAIN: (0, {"empty": 10}), HELD_OUT: (0, {})}


def test_a_few_bad_rows_may_meet_in_a_small_held_out_part(tmp_path: Path) -> None:
    """Of 100 rows 15 may be bad, so 2 of the 5 held out often are."""
    tokenizer = build_tiny(tmp_path / "tiny", ["a q b"])

    def judged(num: int, num_bad: int) -> StoredRows:
        answers = ["b"] * (num - num_bad) + ["a"] * num_bad  # of equal answers none is better
        return store_rows({"prompt": "q", "chosen": "a", "rejected": other} for other in answers)

    def counts(num_bad: int) -> dict[str, dict[str, int]]:
        parts = {TRAIN: judged(95, 13), HELD_OUT: judged(5, num_bad)}
        return load_parts(parts, load_pairs, resolve({}), tokenizer, "pairs")[1]

    assert counts(2) == {TRAIN: {"kept": 82, "equal": 13}, HELD_OUT: {"kept": 3, "equal": 2}}
    with pytest.raises(DataError, match=r"pairs \(held-out\): 5 of 5 rows are bad"):
        counts(5)


def test_of_a_large_set_the_drawn_pairs_alone_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those that are bad are held against the number that was read."""
    num_read = 0

    def counting(row: Row) -> Row:
        nonlocal num_read
        num_read += 1
        return unpack_row(row)

    for module in (pairs, drawn_rows):
        monkeypatch.setattr(module, "unpack_row", counting, raising=False)
    monkeypatch.setattr(pairs, "LARGE", 1000)
    monkeypatch.setattr(drawn_rows, "LARGE", 50)
    monkeypatch.setattr(drawn_rows, "FEW_PROMPTS", 10)
    monkeypatch.setattr(drawn_rows, "BLOCK", 20)
    given = ({"prompt": f"q{n // 2}", "chosen": f"a{n % 7}", "rejected": "a1"} for n in range(2000))
    loaded = replace(store_rows(given), skipped=[SkippedRows("filtered", False, num=5)])
    settings = RewardConfig(eval_rows=4, max_pairs=100)
    parts = split_rows(loaded, settings, 0)
    assert num_read < 500
    prompts = {part: {row["prompt"] for row in found.table} for part, found in parts.items()}
    assert not prompts[TRAIN] & prompts[HELD_OUT]
    tokenizer = build_tiny(tmp_path / "tiny", ["a q b"])
    _, counts = load_parts(parts, load_pairs, resolve({}), tokenizer, "pairs")
    assert counts[TRAIN]["kept"] + counts[TRAIN]["equal"] == 100
    assert counts[TRAIN] | {"kept": 0, "equal": 0} == {
        "kept": 0,
        "equal": 0,
        "filtered": 5,
        "unread": 1896,
    }
    whole = split_rows(loaded, settings, 0, is_whole=True)  # a training that had begun with it
    assert (len(whole[TRAIN].table), whole[TRAIN].num_unread) == (100, 0)
    few_allowed = resolve({"data": {"max_bad_share": 0.01}})
    with pytest.raises(DataError, match="of 100 rows are bad"):
        load_parts(parts, load_pairs, few_allowed, tokenizer, "pairs")
