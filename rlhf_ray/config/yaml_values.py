"""YAML text to plain values: bounded, free of anchors and odd types, each key once."""

import itertools
import re
from collections.abc import Hashable, Iterator
from typing import Any

import yaml

from rlhf_ray.config.section import is_list, is_mapping
from rlhf_ray.errors import ConfigError

MAX_DEPTH = 40
"""Deepest nesting."""
MAX_VALUES = 100_000
"""Most values, those that an anchor repeats counted each time."""


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_OTHER_BASE = re.compile(r"[-+]?(0_*[0-7][0-7_]*|[\d_.]+:.*)$")


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a number.

    It refuses a key that stands twice in a mapping, and numbers that few mean: YAML 1.1 reads 1:30
    as 90 and 010 as 8.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in names:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value} stands here twice",
                        problem_mark=key.start_mark,
                    )
                names.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if node.tag in _NUMBERS and _OTHER_BASE.match(str(value)):
            raise yaml.constructor.ConstructorError(
                problem=f"{value} would be read in base {60 if ':' in value else 8}; write the "
                "number in base ten, or put a text in quotes",
                problem_mark=node.start_mark,
            )
        return value


# YAML 1.1 takes 1e-5 for a string.
_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]  (its stub has no types)
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parsed(text: str, where: str) -> object:
    """Return the value of a YAML text.

    Args:
        text: YAML.
        where: what the text is, for messages.

    Raises:
        ConfigError: it is not valid, or holds more than a config can.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply to be read") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {_problem(error)}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # What constructors raise for a date such as 2024-13-45, an integer of 5000 digits, !!int x.
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"{where} holds a value that YAML cannot read: {reason}") from None
    return plain(value, where)


def plain(value: object, where: str) -> object:
    """Return a copy in which no part occurs twice, so that changing one changes no other.

    Raises:
        ConfigError: it contains itself, is too large, or holds what is no number, text or list.
    """
    return _plain(value, where, (), itertools.count(1))


def _plain(value: object, where: str, keys: tuple[object, ...], count: Iterator[int]) -> object:
    if len(keys) > MAX_DEPTH:
        raise ConfigError(
            f"{where} is nested more than {MAX_DEPTH} levels deep, or contains itself through an "
            "anchor"
        )
    if next(count) > MAX_VALUES:
        raise ConfigError(
            f"{where} holds more than {MAX_VALUES} values; its anchors repeat each other"
        )
    if is_mapping(value):
        return {
            _plain(key, where, (*keys, "a key"), count): _plain(item, where, (*keys, key), count)
            for key, item in value.items()
        }
    if is_list(value):
        return [_plain(item, where, (*keys, i), count) for i, item in enumerate(value)]
    if problem := _problem_of(value):
        place = f" at {'.'.join(map(str, keys))}" if keys else ""
        raise ConfigError(f"{where} holds {problem}{place}")
    return value


def _problem_of(value: object) -> str | None:
    """Return what is wrong with a single value, if anything; not the value, maybe a secret."""
    if isinstance(value, str):
        if "\0" in value:
            return "the character NUL"
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            return "half a character (a lone surrogate)"
        return None
    if isinstance(value, int) and abs(value) >= 2**63:
        return "an integer of more than 63 bits; no key takes one"
    if value is None or isinstance(value, int | float):
        return None
    return f"a {type(value).__name__} (text such as 2024-01-01 needs quotes)"


def _problem(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, without the text around it, which may hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return str(error).splitlines()[0]
    mark = error.problem_mark or error.context_mark
    place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{error.problem or error.context}{place}"
