"""What every config section shares: frozen, strict, unknown keys refused, each field described."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A group of keys. Strict: ``true`` is not a number, ``"8"`` is not an integer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


def changeable(default: Any, **constraints: Any) -> Any:
    """A field that may differ when a run goes on: where or how far, not what is computed."""
    return Field(default, json_schema_extra={"may_change": True}, **constraints)


def refuse_owned(section: str, given: dict[str, Any], owned: dict[str, str]) -> dict[str, Any]:
    """Refuse keys of a pass-through dict that the config sets itself.

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
