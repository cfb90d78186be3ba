from typing import Any

import pytest

from rlhf_ray.data.reading.counts import BadRow, RowTally
from rlhf_ray.data.reading.rows import batches, require_text, row_prompt


def test_batches_number_the_rows() -> None:
    rows: list[dict[str, Any]] = [{"n": n} for n in range(5)]
    found = list(batches(rows, RowTally("set", 0.0), size=2))
    assert [[place for place, _ in batch] for batch in found] == [[0, 1], [2, 3], [4]]
    assert [row["n"] for batch in found for _, row in batch] == [0, 1, 2, 3, 4]


def test_messages_come_before_the_text() -> None:
    turns = [{"role": "user", "content": "a"}]
    assert row_prompt({"messages": turns, "prompt": "b"}) == turns
    assert row_prompt({"messages": None, "prompt": "b"}) == "b"


@pytest.mark.parametrize("value", [" \n", "", None, 3, ["a"]])
def test_cells_without_text(value: object) -> None:
    with pytest.raises(BadRow) as caught:
        require_text({"prompt": value}, "prompt")
    assert caught.value.reason == "empty"
