"""What an address asks for: filters, order and page of the list of samples."""

import math
from collections.abc import Mapping
from urllib.parse import urlencode

from rlhf_ray.errors import ConfigError
from rlhf_ray.observability.samples.reading import SORTS, Query

RANGES = {
    "iteration": "Iteration",
    "version": "Version",
    "score": "Score",
    "kl": "KL",
    "length": "Length",
}
"""Columns that can be filtered, and their titles."""


def query_of(values: Mapping[str, str]) -> Query:
    """Return the query of an address's parameters.

    Raises:
        ConfigError: a bound is no number, or the order is unknown.
    """
    sort = values.get("sort") or "iteration"
    if sort not in SORTS:
        raise ConfigError(f"sort={sort!r} is no order of samples: {', '.join(SORTS)}")
    bounds = {
        name: (_number(values, f"{name}_min"), _number(values, f"{name}_max")) for name in RANGES
    }
    return Query(
        ranges={name: both for name, both in bounds.items() if both != (None, None)},
        source=values.get("source") or None,
        text=values.get("text", "").strip(),
        with_tokens=values.get("tokens") == "1",
        sort=sort,
        descending=values.get("order") != "up",
    )


def page_of(values: Mapping[str, str]) -> int:
    """Return the number of the page, from 0 on.

    Raises:
        ConfigError: it is none.
    """
    number = _number(values, "page") or 0.0
    if number < 0 or not number.is_integer() or number > 2**31:
        raise ConfigError(f"page={values['page']!r} is no number of a page")
    return int(number)


def address(values: Mapping[str, str], **changed: object) -> str:
    """Return the parameters with some changed; empty ones are left out."""
    merged = {**values, **{name: str(value) for name, value in changed.items()}}
    return "?" + urlencode({name: value for name, value in merged.items() if value})


def _number(values: Mapping[str, str], name: str) -> float | None:
    text = values.get(name, "").strip()
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name}={text!r} is no number; clear the field or write one such as 0.5")
    return number
