"""Texts of a large set are tokenised as far as they are taken, and prompts are not split."""

from itertools import islice
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.datasets import drawn_rows
from rlhf_ray.data.datasets.drawn_texts import DrawnTexts
from rlhf_ray.data.datasets.texts import TextRendering, load_documents
from rlhf_ray.data.reading.counts import SkippedRows
from rlhf_ray.data.reading.rows import Row, StoredRows, store_rows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError

NUM_PROMPTS = 60


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn_rows, "BLOCK", 10)
    monkeypatch.setattr(drawn_rows, "FEW_PROMPTS", 5)


class CountedRenderer(Renderer):
    """Counts the texts that it was asked for."""

    num = 0

    def tokenize(self, rows: Any, ended: bool = True) -> Any:
        self.num += len(rows)
        return super().tokenize(rows, ended)


def pairs(num_answers: int = 2, num_prompts: int = NUM_PROMPTS) -> StoredRows:
    return store_rows(
        {"prompt": f"q{n % num_prompts} ", "completion": f"a{n} b{n}", "preferred": n % 4 != 3}
        for n in range(num_prompts * num_answers)
    )


def drawn(
    tokenizer: PreTrainedTokenizerFast, rows: StoredRows, **more: Any
) -> tuple[DrawnTexts, CountedRenderer]:
    renderer = CountedRenderer(tokenizer)
    rendering = TextRendering(renderer, **{"preferred_only": True, "loss_on": "completion"} | more)
    return DrawnTexts(rows, rendering, seed=3, max_bad_share=0.2, name="set"), renderer


def test_only_what_is_taken_is_tokenised_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    texts, renderer = drawn(tokenizer, pairs())
    taken = list(islice(texts.documents(held_out=False), 12))
    assert len(taken) == 12
    assert 12 <= renderer.num < 25
    assert texts.counts["kept"] == renderer.num
    assert sum(texts.counts.values()) == 2 * NUM_PROMPTS
    assert texts.counts["unread"] >= 90
    list(islice(texts.documents(held_out=True), 1))
    assert sum(texts.counts.values()) == 2 * NUM_PROMPTS  # no row is counted twice


def test_all_that_can_be_taken_is_the_whole_set_with_each_prompt_in_one_part(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = pairs()
    texts, _ = drawn(tokenizer, rows)
    parts = {held_out: list(texts.documents(held_out)) for held_out in (False, True)}
    whole, counts = load_documents(rows, **vars(texts._rendering))
    assert texts.counts == counts | {"unread": 0}

    def as_set(documents: Any) -> set[tuple[Any, ...]]:
        return {(*each["token_ids"], *each["learnt"]) for each in documents}

    assert as_set(parts[False]) | as_set(parts[True]) == as_set(whole)
    groups = [{each["group"] for each in part} for part in parts.values()]
    assert not groups[0] & groups[1]
    assert 1 <= len(groups[1]) <= NUM_PROMPTS // 5
    again, _ = drawn(tokenizer, rows)
    assert list(again.documents(False)) == parts[False]


def test_rows_of_few_prompts_are_held_out_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    texts, _ = drawn(tokenizer, pairs(num_answers=100, num_prompts=1))
    num_held_out = len(list(texts.documents(held_out=True)))
    assert 1 <= num_held_out <= 15
    assert num_held_out + len(list(texts.documents(held_out=False))) == 75


def test_a_part_without_a_usable_row_in_its_first_block_is_read_on(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    given: list[Row] = [
        {"prompt": f"q{n}", "completion": "a", "preferred": n == 50} for n in range(80)
    ]
    texts, _ = drawn(tokenizer, store_rows(given))
    assert len([*texts.documents(False), *texts.documents(True)]) == 1


def test_too_many_bad_rows_end_it_before_all_are_read(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = store_rows({"prompt": f"q{n}", "completion": "a" * (n % 2)} for n in range(1000))
    texts, renderer = drawn(tokenizer, rows)
    with pytest.raises(DataError, match=r"of \d+ rows are bad"):
        list(texts.documents(False))
    assert renderer.num < 100


def test_what_the_reader_skipped_is_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    table = pairs().table
    texts, _ = drawn(tokenizer, StoredRows(table, [SkippedRows("filtered", False, num=7)]))
    list(islice(texts.documents(False), 1))
    assert texts.counts["filtered"] == 7
