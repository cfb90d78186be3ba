"""The base of config sections: keys with units, and the refusal of owned keys and secrets."""

import math
import os
import re
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any, TypedDict, TypeGuard, TypeVar, Unpack
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationInfo, field_validator

from rlhf_ray.secrecy import HIDDEN, holds_secret, is_secret, without_shapes

T = TypeVar("T")
M = TypeVar("M", bound=Mapping[str, object])

PassThrough = dict[str, Any]
"""Keys that a library defines and checks, not we."""


MOST_PROCESSES = 100_000
"""Most processes of a role; the plan counts them one by one."""

_PATHS = ("path", "dir", "scratch", "posts", "instructions")
"""Names of keys that hold paths."""
_NAMED = ("function", "advantage", "policy_loss", "tracking_uri", "models", "callbacks")
_FROM_HOME = (*_PATHS, *_NAMED)
"""Names of keys, or of lists, whose text may begin with a path."""
_DECLARATIONS = ("properties", "patternProperties", "$defs", "definitions")
"""What a JSON schema declares under names."""
LONGEST_PART, LONGEST_PATH = 255, 4095
"""Bytes of a file's name, and of a whole path, on Linux."""


class Section(BaseModel):
    """A group of keys. Strict: ``true`` is not a number, ``"8"`` is not an integer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    @field_validator("*")
    @classmethod
    def _is_finite(cls, value: object) -> object:
        if (number := _not_finite(value)) is not None:
            raise ValueError(f"Input should be a finite number, got {number}")
        return value

    @field_validator("*")
    @classmethod
    def _from_home(cls, value: object, info: ValidationInfo) -> object:
        """Replace the ``~`` of a path, which only shells do: else a folder would have that name."""
        if info.field_name in _FROM_HOME:
            if isinstance(value, str):
                return os.path.expanduser(value)
            if is_list(value):
                return [os.path.expanduser(item) for item in value if isinstance(item, str)]
        return value

    @field_validator("*")
    @classmethod
    def _can_be_a_file(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what no file system takes: looking for it would raise, wherever that is done."""
        paths = value if is_list(value) else [value]
        for path in paths if info.field_name in _PATHS else ():
            if not isinstance(path, str):
                continue
            longest = max(len(part.encode()) for part in path.split("/"))
            if longest > LONGEST_PART or len(path.encode()) > LONGEST_PATH:
                raise ValueError(
                    f"is no path: a file's name has at most {LONGEST_PART} bytes, and this has "
                    f"{longest}"
                    if longest > LONGEST_PART
                    else f"is no path: it has more than {LONGEST_PATH} bytes"
                )
        return value


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


def adjustable(default: T | EllipsisType, *, unit: str = "", **bounds: Unpack[Bounds]) -> T:
    """Declare a key that may change on resume though it changes what is computed.

    It is what a run that goes wrong is steered by. Each change is recorded in the run's folder. The
    arguments are those of `fixed`.
    """
    return _key(default, {"may_change": True, "recorded": True}, unit, bounds)


def _key(default: object, extra: dict[str, JsonValue], unit: str, bounds: Bounds) -> Any:
    if unit:
        extra["unit"] = unit
    return Field(default, json_schema_extra=extra or None, **bounds)


def _not_finite(value: object) -> float | None:
    """Return a number of a value, at any depth, that is infinite or NaN; None without one."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    inner = value.values() if is_mapping(value) else value if is_list(value) else ()
    return next((found for item in inner if (found := _not_finite(item)) is not None), None)


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
    """Refuse keys of a mapping, at any depth, that hold a secret by their name or their value.

    Raises:
        ValueError: naming each refused key, without its value.
    """
    if names := ", ".join(repr(keys[-1]) for keys in secret_keys(given)):
        raise ValueError(
            f"{section} may not contain {names}, because the config is written to run.dir; {remedy}"
        )
    return given


def has_user_info(url: str) -> bool:
    """Return whether a URL carries a login, ``scheme://user:password@host``."""
    try:
        return "@" in urlsplit(url).netloc
    except ValueError:  # half an IPv6 address
        return "@" in re.split("[/?#]", url.partition("//")[2])[0]


def require_host(url: str) -> str:
    """Return an http address; refuse one without a host, or with an impossible port.

    Raises:
        ValueError: the address cannot be reached as it is written.
    """
    wrong = "is no address with a host, such as http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        is_wrong = not parts.hostname or parts.port == 0 or any(c.isspace() for c in url)
    except ValueError as error:  # half an IPv6 address, port 99999
        raise ValueError(f"{wrong}: {error}") from None
    if is_wrong:
        raise ValueError(wrong)
    return url


def masked(value: Any, key: str = "", hidden: str = HIDDEN) -> Any:
    """Return a config's values without secrets, for report, trackers, cards and messages.

    Environment variables keep only their names, secrets lose their value, URLs login and keys.

    Args:
        value: a value of the config, nested or not.
        key: its name.
        hidden: stands for a secret.
    """
    if key and not is_mapping(value) and not is_list(value) and is_secret(key, value):
        return hidden
    if is_mapping(value):
        if key == "env":
            return dict.fromkeys(value, hidden)
        return {
            name: masked(item, _within(key, name, item), hidden) for name, item in value.items()
        }
    if is_list(value):
        return [masked(item, key, hidden) for item in value]
    return without_shapes(value) if isinstance(value, str) else value


def secret_keys(
    value: object, keys: tuple[str, ...] = (), name: str = ""
) -> Iterator[tuple[str, ...]]:
    """Yield the path of each key, at any depth, that holds a secret by its name or its value.

    Args:
        value: a value of the config, nested or not.
        keys: where it stands.
        name: the name that decides whether it is a secret.
    """
    if is_mapping(value):
        for key, item in value.items():  # YAML allows numbers as keys
            yield from secret_keys(item, (*keys, str(key)), _within(name, key, item))
    elif is_list(value):
        for item in value:
            yield from secret_keys(item, keys, name)
    elif is_secret(name, value) or (isinstance(value, str) and holds_secret(value)):
        yield keys


def _within(outer: str, name: object, value: object) -> str:
    """Return the name that decides for a nested value; empty where none does.

    ``credentials: {user: x}`` is secret. The names of columns and of a JSON schema's properties are
    those of data: ``properties: {password: {type: string}}`` is not.
    """
    if outer == "columns" or (outer in _DECLARATIONS and is_mapping(value)):
        return ""
    return outer if is_secret(outer, 1) else str(name)
