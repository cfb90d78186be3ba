"""What every config section shares: frozen, strict, unknown keys refused, each key described."""

from collections.abc import Mapping
from types import EllipsisType
from typing import Any, TypedDict, TypeVar, Unpack, overload

from pydantic import BaseModel, ConfigDict, Field, JsonValue

T = TypeVar("T")
M = TypeVar("M", bound=Mapping[str, object])


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
