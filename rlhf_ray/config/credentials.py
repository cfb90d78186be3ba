"""What the config may not hold, because it is written to run.dir, and what others may not see."""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

_SECRET_NAME = re.compile(
    r"(token|secret|passw(or)?d|(api|access|secret|private|auth)[_-]?key|credentials|authorization)$",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"(?<=://)[^/?#\s]+(?=@)")


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
