"""What every config section shares: frozen, strict, unknown keys refused, each key described."""

import re
from collections.abc import Iterator, Mapping
from types import EllipsisType
from typing import Any, TypedDict, TypeVar, Unpack, overload
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue

T = TypeVar("T")
M = TypeVar("M", bound=Mapping[str, object])

_SECRET_NAME = re.compile(
    r"(token|secret|passw(or)?d|(api|access|secret|private|auth)[_-]?key|credentials|authorization)$",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(?<=://)[^/?#\s]+(?=@)")


class Section(BaseModel):
    """A group of keys. Strict: ``true`` is not a number, ``"8"`` is not an integer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class Bounds(TypedDict, total=False):
    """What pydantic's ``Field`` takes of a key."""

    description: str
    ge: float
    gt: float
    le: float
    lt: float
    min_length: int
    pattern: str


@overload
def fixed(default: EllipsisType, *, unit: str = "", **bounds: Unpack[Bounds]) -> Any: ...
@overload
def fixed(default: T, *, unit: str = "", **bounds: Unpack[Bounds]) -> T: ...
def fixed(default: object, *, unit: str = "", **bounds: Unpack[Bounds]) -> object:
    """Declare a key that keeps its value once a stage that reads it has begun.

    Args:
        default: its default; ``...``: the key is required.
        unit: of a number, for docs/config.md; ``–``: a pure number.
        bounds: description and limits, as pydantic's ``Field`` takes them.
    """
    return _key(default, {}, unit, bounds)


@overload
def changeable(default: EllipsisType, *, unit: str = "", **bounds: Unpack[Bounds]) -> Any: ...
@overload
def changeable(default: T, *, unit: str = "", **bounds: Unpack[Bounds]) -> T: ...
def changeable(default: object, *, unit: str = "", **bounds: Unpack[Bounds]) -> object:
    """Declare a key that may differ when a run resumes: it says where or how far, not what is
    computed. The arguments are those of `fixed`."""
    return _key(default, {"may_change": True}, unit, bounds)


def _key(default: object, extra: dict[str, JsonValue], unit: str, bounds: Bounds) -> object:
    if unit:
        extra["unit"] = unit
    return Field(default, json_schema_extra=extra or None, **bounds)


def refuse_owned(section: str, given: M, owned: Mapping[str, str]) -> M:
    """Refuse keys of a pass-through mapping that the config sets itself.

    Args:
        section: dotted name of the pass-through key, for the message.
        given: what the user wrote.
        owned: library key -> the config key to use instead.

    Raises:
        ValueError: naming each refused key and the key that sets it.
    """
    clashes = [f"{key!r} (set by {owned[key]})" for key in given if key in owned]
    if clashes:
        raise ValueError(f"{section} may not contain {', '.join(clashes)}")
    return given


def refuse_secrets(section: str, given: dict[str, Any], remedy: str) -> dict[str, Any]:
    """Refuse keys of a pass-through dict, at any depth, that hold a secret by their names.

    A value that is no text is none: ``token: true`` asks for the login of this machine.

    Args:
        section: dotted name of the pass-through key, for the message.
        given: what the user wrote.
        remedy: where the secret belongs, for the message.

    Raises:
        ValueError: naming each refused key, without its value.
    """
    if names := ", ".join(repr(name) for name in _secret_names(given)):
        raise ValueError(
            f"{section} may not contain {names}, because the config is written to run.dir; {remedy}"
        )
    return given


def has_user_info(url: str) -> bool:
    """Whether a URL carries a login, ``scheme://user:password@host``."""
    return "@" in urlsplit(url).netloc


def masked(value: Any, key: str = "") -> Any:
    """A config's values as trackers and model cards may show them.

    Environment variables are left by name alone, secrets without their value, URLs without login.
    """
    if isinstance(value, Mapping):
        if key == "env":
            return dict.fromkeys(value, "...")
        return {name: masked(item, str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [masked(item, key) for item in value]
    if not isinstance(value, str):
        return value
    return "..." if _SECRET_NAME.search(key) else _USER_INFO.sub("...", value)


def _secret_names(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            if isinstance(item, str) and _SECRET_NAME.search(str(name)):
                yield str(name)
            yield from _secret_names(item)
    elif isinstance(value, list):
        for item in value:
            yield from _secret_names(item)
