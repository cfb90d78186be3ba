"""Filters of a dataset's rows: comparisons from the config, or the user's functions."""

import operator
from collections.abc import Callable, Mapping, Sequence, Sized

from rlhf_ray.config.data import RowFilter
from rlhf_ray.data.reading.chats import parse_messages
from rlhf_ray.data.reading.counts import BadRow
from rlhf_ray.data.reading.rows import Row, parse_bool
from rlhf_ray.errors import DataError
from rlhf_ray.plugins import load_function

Predicate = Callable[[Row], bool]

_OPERATORS: Mapping[str, Callable[..., bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda value, choices: value in choices,
    "not_in": lambda value, choices: value not in choices,
    "contains": operator.contains,
}


def build_predicate(filters: Sequence[RowFilter], name: str) -> Predicate:
    """Return a function that is true for rows that pass all filters.

    A cell without a value (None) passes no comparison, ``!=`` and ``not_in`` included. The function
    raises `BadRow` where the filters fail on a row, but `DataError` where they fail on the first:
    then a filter is wrong, and not a row.

    Raises:
        ConfigError: a function cannot be imported.
    """
    predicates = [
        load_function(item.function, "filter") if item.function else _comparison(item)
        for item in filters
    ]

    worked = False

    def passes(row: Row) -> bool:
        nonlocal worked
        try:
            is_kept = all(test(row) for test in predicates)
            worked = True
            return is_kept
        except Exception as error:  # a user's function may raise anything
            failure = f"{type(error).__name__}: {error}"
            if worked:
                raise BadRow("filter_fails", f"a filter fails on it: {failure}") from error
            raise DataError(
                f"{name}: a filter cannot be applied to a row with the columns {', '.join(row)}: "
                f"{failure}. Correct the column, op or value (or the "
                "function) of the dataset's filter"
            ) from error

    return passes


def _comparison(item: RowFilter) -> Predicate:
    compare, column = _OPERATORS[item.op], str(item.column)
    kind = type(item.value[0] if isinstance(item.value, list) and item.value else item.value)

    def passes(row: Row) -> bool:
        value = _cell(row, column)
        if value is None:
            return False
        return bool(compare(_length(value) if item.length else _convert(value, kind), item.value))

    return passes


def _cell(row: Row, column: str) -> object:
    if column == "prompt" and row.get("messages"):
        return "\n".join(message["content"] for message in parse_messages(row["messages"]))
    return row[column]


def _length(value: object) -> int:
    if not isinstance(value, Sized):
        raise TypeError(f"{value!r} has no length")
    return len(value)


def _convert(value: object, kind: type) -> object:
    """Convert a text to the type of the filter's value if it can be: csv cells are all text."""
    if not isinstance(value, str) or kind not in (bool, int, float):
        return value
    if kind is bool:
        return parse_bool(value)
    try:
        return float(value)
    except ValueError:
        return value
