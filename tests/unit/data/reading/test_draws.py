from collections.abc import Mapping
from typing import Any

import pytest

from rlhf_ray.data.reading.counts import RowTally, SkippedRows
from rlhf_ray.data.reading.draws import SAMPLE, prompt_group, split_groups, try_sample
from rlhf_ray.data.reading.rows import StoredRows, batches, require_text, store_rows
from rlhf_ray.errors import DataError


class TestHeldOutRows:
    def test_are_spread_over_the_whole_and_follow_the_seed(self) -> None:
        train, held_out = split_groups(range(1000), 100, seed=3)
        assert sorted([*train, *held_out]) == list(range(1000))
        assert train == sorted(train)
        assert len(held_out) == 100
        assert 350 < sum(held_out) / 100 < 650  # the ends of the dataset would be 50 and 950
        assert held_out != sorted(held_out), "so that the first of them are a sample too"
        assert split_groups(range(1000), 100, seed=3)[1] == held_out
        assert split_groups(range(1000), 100, seed=4)[1] != held_out

    @pytest.mark.parametrize("sizes", [[3] * 20, [1, 2, 3, 4, 5, 6], [50, 1], [1] * 8])
    def test_share_no_prompt_with_the_others(self, sizes: list[int]) -> None:
        groups = [group for group, size in enumerate(sizes) for _ in range(size)]
        for seed in range(20):
            train, held_out = split_groups(groups, 7, seed)
            assert {groups[row] for row in train}.isdisjoint(groups[row] for row in held_out)
            assert train
            assert 1 <= len(held_out) <= 7

    @pytest.mark.parametrize("groups", ["qqqqqqqqqq", "aaaaabbbbb", "q" * 3])
    def test_of_a_few_large_prompts_are_drawn_alone(self, groups: str) -> None:
        train, held_out = split_groups(groups, 2, seed=0)
        assert (len(train), len(held_out)) == (len(groups) - 2, 2)

    def test_stay_held_out_as_rows_come_and_go(self) -> None:
        prompts = [f"prompt {number}" for number in range(1100)]

        def held_out(rows: list[str], num: int) -> set[str]:
            return {rows[row] for row in split_groups(rows, num, seed=3)[1]}

        before = held_out(prompts[:1000], 100)
        assert before < held_out(prompts[:1000], 150)
        for others in (held_out(prompts, 110), held_out(prompts[50:1000], 100)):
            assert len(before & others) > 85

    def test_of_nothing_are_none(self) -> None:
        assert split_groups([], 1, seed=0) == ([], [])

    def test_rows_of_one_prompt_are_a_group(self) -> None:
        chat = [{"role": "user", "content": "q"}]
        rows: list[dict[str, Any]] = [
            {"prompt": "q", "chosen": "a", "n": 1},
            {"prompt": "q", "chosen": "b"},
            {"messages": chat, "completion": "a"},
            {"messages": chat, "tools": [{"name": "f"}]},
            {"text": "q"},
        ]
        groups = [prompt_group(row) for row in rows]
        assert groups[0] == groups[1]
        assert len(set(groups)) == 4


class TestSample:
    """A loader that keeps rows with a text in their column prompt."""

    def load(self, rows: StoredRows, max_bad_share: float, name: str) -> None:
        tally = RowTally(name, max_bad_share)
        for batch in batches(rows, tally):
            self.num_read += len(batch)
            for _, row in batch:
                if row.get("long"):
                    tally.drop_unused("overlong")
                elif require_text(row, "prompt") == "bad":
                    tally.drop_bad("empty")
                else:
                    tally.keep()
        tally.finish()

    def stored(self, rows: list[Mapping[str, Any]], *skipped: SkippedRows) -> StoredRows:
        self.num_read = 0
        return store_rows([*rows, *skipped])

    def test_finds_what_will_fail_before_all_is_read(self) -> None:
        rows = [{"prompt": "good"}] * 1500 + [{"prompt": "bad"}] * 1500
        with pytest.raises(DataError, match=r"a sample of 500 rows of set: 2\d\d of 500 rows are"):
            try_sample(self.stored(rows), self.load, 0.2, "set")
        assert self.num_read == SAMPLE
        rows = [{"prompt": "long", "long": True}] * 3000
        with pytest.raises(DataError, match=r"none of 500 rows .*overlong: 500.*length limit"):
            try_sample(self.stored(rows), self.load, 0.2, "set")

    def test_passes_what_will_pass(self) -> None:
        rows = [{"prompt": "good"}] * 2400 + [{"prompt": "bad"}] * 600
        try_sample(self.stored(rows), self.load, 0.2, "set")
        # Of the whole set, not of what is left to tokenise, a fifth may be bad.
        rows = [{"prompt": "good"}] * 1500 + [{"prompt": "bad"}] * 1500
        left_out = SkippedRows("filtered", is_bad=False, num=5000)
        try_sample(self.stored(rows, left_out), self.load, 0.2, "set")

    def test_is_not_taken_of_few_rows(self) -> None:
        try_sample(self.stored([{"prompt": "bad"}] * 1000), self.load, 0.0, "set")
        assert self.num_read == 0
