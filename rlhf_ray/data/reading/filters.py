"""Which rows of a data set are kept."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_ray.config.data import RowFilter
from rlhf_ray.data.reading.rows import Row, parse_bool
from rlhf_ray.errors import DataError
from rlhf_ray.plugins import load_function

Predicate = Callable[[Row], bool]

_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, among: value in among,
    "not_in": lambda value, among: value not in among,
    "contains": lambda value, part: part in value,
}


def build_predicate(filters: Sequence[RowFilter], name: str) -> Predicate:
    """Whether a row passes all filters; a cell without a value passes no comparison.

    Args:
        filters: from the config.
        name: the data set, for messages.

    Raises:
        ConfigError: a function cannot be imported.
    """
    tests = [
        load_function(item.function, "filter") if item.function else _comparison(item)
        for item in filters
    ]

    def passes(row: Row) -> bool:
        try:
            return all(test(row) for test in tests)
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{name}: a filter cannot be applied to a row with the columns {', '.join(row)}: "
                f"{type(error).__name__}: {error}"
            ) from error

    return passes


def _comparison(item: RowFilter) -> Predicate:
    compare, column = _OPERATORS[item.op], str(item.column)
    kind = type(item.value[0] if isinstance(item.value, list) and item.value else item.value)

    def passes(row: Row) -> bool:
        value = _value(row, column)
        if value is None:
            return False
        found = len(value) if item.length else _as(kind, value)
        return bool(compare(found, item.value))

    return passes


def _as(kind: type, value: Any) -> Any:
    """A cell of text, such as all of a csv file are, as what it is compared with, if it can be."""
    if not isinstance(value, str) or kind not in (bool, int, float):
        return value
    if kind is bool:
        return parse_bool(value)
    try:
        return float(value)
    except ValueError:
        return value


def _value(row: Row, column: str) -> Any:
    if column == "prompt" and row.get("messages"):
        return "\n".join(message["content"] for message in row["messages"])
    return row[column]
