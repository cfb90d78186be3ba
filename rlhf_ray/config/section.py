"""The base of config sections: keys with units, and the refusal of owned keys and secrets."""

import re
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any, TypedDict, TypeGuard, TypeVar, Unpack
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue

T = TypeVar("T")
M = TypeVar("M", bound=Mapping[str, object])

PassThrough = dict[str, Any]
"""Keys that a library defines and checks, not we."""

_SECRET_NAME = re.compile(
    r"(token|secret|passw(or)?d|(api|access|secret|private|auth)[_-]?key|credentials|authorization)$",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(?<=://)[^/?#\s]+(?=@)")


class Section(BaseModel):
    """A group of keys. Strict: ``true`` is not a number, ``"8"`` is not an integer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class Bounds(TypedDict, total=False):
    """The arguments of pydantic's ``Field`` that keys use."""

    description: str
    ge: float
    gt: float
    le: float
    lt: float
    min_length: int
    pattern: str


def fixed(default: T | EllipsisType, *, unit: str = "", **bounds: Unpack[Bounds]) -> T:
    """Declare a key that keeps its value once a stage that reads it has begun.

    Args:
        default: the default; ``...``: the key is required.
        unit: unit of a number, for docs/config.md; ``–``: none.
        bounds: description and limits.
    """
    return _key(default, {}, unit, bounds)


def changeable(default: T | EllipsisType, *, unit: str = "", **bounds: Unpack[Bounds]) -> T:
    """Declare a key that may change on resume: it says where or how long, not what is computed.

    The arguments are those of `fixed`.
    """
    return _key(default, {"may_change": True}, unit, bounds)


def _key(default: object, extra: dict[str, JsonValue], unit: str, bounds: Bounds) -> Any:
    if unit:
        extra["unit"] = unit
    return Field(default, json_schema_extra=extra or None, **bounds)


def is_mapping(value: object) -> TypeGuard[dict[str, object]]:
    """Return whether a value that is not validated yet is a mapping."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[object]]:
    """Return whether a value that is not validated yet is a list."""
    return isinstance(value, list)


def duplicates(names: list[str] | None) -> str:
    """Return the names that stand in a list more than once, joined by commas."""
    names = names or []
    return ", ".join(sorted({name for name in names if names.count(name) > 1}))


def refuse_owned(section: str, given: M, owned: Mapping[str, str]) -> M:
    """Refuse keys of a pass-through mapping that the config sets itself."""
    clashes = [f"{key!r} (set by {owned[key]})" for key in given if key in owned]
    if clashes:
        raise ValueError(f"{section} may not contain {', '.join(clashes)}")
    return given


def refuse_secrets(section: str, given: M, remedy: str) -> M:
    """Refuse keys of a mapping, at any depth, whose names say that they hold a secret.

    Only text counts: ``token: true`` asks for the login of this machine.

    Raises:
        ValueError: naming each refused key, without its value.
    """
    if names := ", ".join(repr(name) for name in _secret_names(given)):
        raise ValueError(
            f"{section} may not contain {names}, because the config is written to run.dir; {remedy}"
        )
    return given


def has_user_info(url: str) -> bool:
    """Return whether a URL carries a login, ``scheme://user:password@host``."""
    return "@" in urlsplit(url).netloc


def masked(value: Any, key: str = "") -> Any:
    """Return a config's values without secrets, for trackers and model cards.

    Environment variables keep only their names, secrets lose their value, URLs their login.
    """
    if is_mapping(value):
        if key == "env":
            return dict.fromkeys(value, "...")
        return {name: masked(item, str(name)) for name, item in value.items()}
    if is_list(value):
        return [masked(item, key) for item in value]
    if not isinstance(value, str):
        return value
    return "..." if _SECRET_NAME.search(key) else _USER_INFO.sub("...", value)


def _secret_names(value: object) -> Iterator[str]:
    if is_mapping(value):
        for name, item in value.items():
            if isinstance(item, str) and _SECRET_NAME.search(str(name)):  # YAML allows numbers
                yield str(name)
            yield from _secret_names(item)
    elif is_list(value):
        for item in value:
            yield from _secret_names(item)
