import sys
from types import ModuleType
from typing import Any

import pytest

from rlhf_ray.config.data import RowFilter
from rlhf_ray.data.reading.filters import build_predicate
from rlhf_ray.errors import ConfigError, DataError

ROW: dict[str, Any] = {"prompt": "Why so?", "votes": 3, "tags": ["a", "b"], "none": None}
CELLS = {"cell": "3.5", "said": "False"}
"""Of a csv file: all text."""


def passes(row: dict[str, Any], *filters: Any) -> bool:
    return build_predicate([RowFilter.model_validate(item) for item in filters], "set")(row)


@pytest.mark.parametrize(
    ("column", "op", "value", "expected"),
    [
        ("votes", "==", 3, True),
        ("votes", "!=", 3, False),
        ("votes", "<", 3, False),
        ("votes", "<=", 3, True),
        ("votes", ">", 2, True),
        ("votes", ">=", 4, False),
        ("votes", "in", [1, 3], True),
        ("votes", "not_in", [1, 3], False),
        ("prompt", "contains", "so", True),
        ("tags", "contains", "c", False),
        ("none", "!=", 3, False),
        ("cell", ">=", 3, True),
        ("cell", "in", [1, 3.5], True),
        ("cell", "==", "3.5", True),
        ("prompt", "==", 3, False),
        ("said", "==", True, False),
    ],
)
def test_comparisons(column: str, op: str, value: Any, expected: bool) -> None:
    assert passes(ROW | CELLS, {"column": column, "op": op, "value": value}) is expected


def test_lengths_and_several_filters() -> None:
    short = {"column": "prompt", "length": True, "op": "<", "value": 8}
    two = {"column": "tags", "length": True, "op": "==", "value": 2}
    assert passes(ROW, short, two)
    assert not passes(ROW, short, two, {"column": "votes", "op": "<", "value": 3})
    chat = {"messages": [{"role": "user", "content": "x" * 5}, {"role": "user", "content": "yz"}]}
    assert not passes(chat, short)  # five, a line break, two


def test_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_filters")
    module.liked = lambda row: row["votes"] > 2  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_filters", module)
    assert passes(ROW, "own_filters:liked")
    assert not passes({"votes": 1}, "own_filters:liked")
    with pytest.raises(ConfigError, match="own_filters has no function hated"):
        passes(ROW, "own_filters:hated")


def test_values_that_cannot_be_compared() -> None:
    with pytest.raises(DataError, match=r"set: a filter cannot be applied .* TypeError"):
        passes(ROW, {"column": "prompt", "op": "<", "value": 3})
