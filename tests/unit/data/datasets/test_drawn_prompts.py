"""Prompts of a large set are rendered as far as they are used, and are the same ones each time."""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.datasets import drawn_rows
from rlhf_ray.data.datasets.drawn_prompts import DrawnPrompts, is_held_out
from rlhf_ray.data.datasets.prompts import PromptRendering
from rlhf_ray.data.reading.counts import BadRow, SkippedRows
from rlhf_ray.data.reading.rows import Row, StoredRows, store_rows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.driver.batches import PromptCursor
from rlhf_ray.errors import DataError

NUM_ROWS = 95


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_rows, "BLOCK", 10)


class Counted:
    """A check that counts the rows that were rendered."""

    def __init__(self) -> None:
        self.num = self.num_here = 0
        self._here = threading.get_ident()

    def __call__(self, fields: Row) -> None:
        self.num += 1
        self.num_here += threading.get_ident() == self._here
        if fields.get("bad"):
            raise BadRow("refused")


def rows(num: int = NUM_ROWS, every_bad: int = 0) -> StoredRows:
    given = (
        {"question_id": n, "prompt": f"q{n}", "bad": bool(every_bad) and n % every_bad == 0}
        for n in range(num)
    )
    return store_rows(given)


def drawn(
    tokenizer: PreTrainedTokenizerFast, given: StoredRows, check: Counted, **more: Any
) -> DrawnPrompts:
    rendering = PromptRendering(Renderer(tokenizer), 8, checks=[check])
    options = {"seed": 3, "max_bad_share": 0.2, "name": "set"} | more
    return DrawnPrompts(given, rendering, **options)


def texts(prompts: Sequence[Any]) -> list[str]:
    return [prompt.text for prompt in prompts]


def test_only_what_is_used_is_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    check = Counted()
    prompts = drawn(tokenizer, rows(), check)
    first = PromptCursor(prompts, 3).take(range(15))
    assert check.num_here == 20
    assert check.num <= 30  # one block more, ahead
    assert len(set(texts(first))) == 15
    assert prompts.counts == {"kept": 20, "unread": 75}
    assert len(prompts) == NUM_ROWS


def test_the_next_block_is_rendered_ahead_in_another_thread(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    check = Counted()
    prompts = drawn(tokenizer, rows(), check)
    cursor = PromptCursor(prompts, 3)
    taken = texts(cursor.take(range(6))) + texts(cursor.take(range(6, 12)))
    taken += texts(cursor.take(range(12, 18)))
    assert check.num_here == 10
    assert prompts.counts == {"kept": 20, "unread": 75}  # those taken, whatever is ready
    assert taken == texts(PromptCursor(drawn(tokenizer, rows(), Counted()), 3).take(range(18)))


@pytest.mark.parametrize("steps", [[300], [1] * 300, [7, 200, 93]])
def test_every_prompt_is_drawn_once_a_pass_however_they_are_taken(
    tokenizer: PreTrainedTokenizerFast, steps: list[int]
) -> None:
    cursor = PromptCursor(drawn(tokenizer, rows(every_bad=10), Counted()), 3)
    taken: list[str] = []
    for step in steps:
        taken += texts(cursor.take(range(len(taken), len(taken) + step)))
    whole = PromptCursor(drawn(tokenizer, rows(every_bad=10), Counted()), 3)
    assert taken == texts(whole.take(range(300)))
    size = NUM_ROWS - 10
    good = sorted(f"q{n}" for n in range(NUM_ROWS) if n % 10)
    for start in (0, size, 2 * size):
        assert sorted(taken[start : start + size]) == good
    assert taken[:size] != taken[size : 2 * size]


def test_a_resume_renders_nothing_again(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    given, first, second = rows(every_bad=10), Counted(), Counted()
    before = drawn(tokenizer, given, first, store=tmp_path)
    started = texts(PromptCursor(before, 3).take(range(25)))
    after = drawn(tokenizer, given, second, store=tmp_path)
    resumed = PromptCursor(after, 3)
    assert texts(resumed.take(range(20, 25))) == started[20:]
    assert second.num == 0
    assert after.counts == before.counts
    resumed.take(range(25, 60))
    assert second.num > 0
    whole = texts(PromptCursor(drawn(tokenizer, given, Counted()), 3).take(range(60)))
    assert started == whole[:25]


def test_a_damaged_block_is_rendered_again(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    given = rows()
    started = texts(drawn(tokenizer, given, Counted(), store=tmp_path)[:20])
    (tmp_path / "10" / "counts.json").write_text("{", encoding="utf-8")
    check = Counted()
    assert texts(drawn(tokenizer, given, check, store=tmp_path)[:20]) == started
    assert check.num == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "10"]


@pytest.mark.parametrize("is_stored", [False, True])
def test_a_repeated_prompt_is_dropped_in_any_block(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, is_stored: bool
) -> None:
    given = store_rows({"question_id": n // 2, "prompt": f"q{n // 2}"} for n in range(90))
    store = tmp_path if is_stored else None
    if is_stored:
        drawn(tokenizer, given, Counted(), store=store).reach(30)
    prompts = drawn(tokenizer, given, Counted(), store=store)
    assert prompts.reach(90) == 45
    assert sorted(texts(prompts[:])) == sorted(f"q{n}" for n in range(45))
    assert prompts.counts == {"kept": 45, "repeated": 45, "unread": 0}


def test_bad_rows_are_counted_with_those_that_the_reader_skipped(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    given = StoredRows(rows(every_bad=10).table, [SkippedRows("refused", True, num=2)])
    prompts = drawn(tokenizer, given, Counted())
    prompts.reach(NUM_ROWS)
    assert prompts.counts == {"kept": 85, "refused": 12, "unread": 0}
    assert len(prompts) == 85


def test_too_many_bad_rows_end_the_reading(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = drawn(tokenizer, rows(every_bad=2), Counted(), max_bad_share=0.3)
    with pytest.raises(DataError, match=r"set: \d+ of \d+ rows are bad"):
        prompts.reach(NUM_ROWS)
    one = drawn(tokenizer, rows(every_bad=1), Counted(), max_bad_share=0.3)
    with pytest.raises(DataError, match="10 of 10 rows are bad"):
        one.reach(1)


def test_parts_are_apart_and_make_up_the_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    given = rows()
    held = drawn(tokenizer, given, Counted(), part=lambda text: is_held_out(text, 3))
    train = drawn(tokenizer, given, Counted(), part=lambda text: not is_held_out(text, 3))
    sample = held.sample(3, 3)
    assert texts(held.sample(2, 3)) == texts(sample)[:2]
    together = texts(held[:]) + texts(train[:])
    assert sorted(together) == sorted(f"q{n}" for n in range(NUM_ROWS))
    assert 2 <= len(texts(held[:])) <= 25


def test_ids_without_a_column_are_the_rows_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    table = datasets.Dataset.from_list([{"prompt": f"q{n}"} for n in range(30)])
    prompts = drawn(tokenizer, StoredRows(table), Counted())
    assert all(prompt.text == f"q{prompt.id}" for prompt in prompts)
    assert len({prompt.id for prompt in prompts}) == 30
