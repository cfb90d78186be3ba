"""Read YAML files and dotted overrides into a validated Config.

A file may name a parent in ``extends`` (relative to itself, or ``@name`` for a shipped config),
whose keys it overrides. ``${NAME}`` and ``${NAME:-default}`` in strings are replaced from the
environment.
"""

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlhf_ray.config.key_aliases import hints as alias_hints
from rlhf_ray.config.root import Config
from rlhf_ray.config.section import is_list, is_mapping, masked, secret_keys
from rlhf_ray.config.shipped import located
from rlhf_ray.config.yaml_values import parsed, plain
from rlhf_ray.errors import ConfigError
from rlhf_ray.secrecy import is_secret

Values = dict[str, object]

MAX_BYTES = 10 * 2**20
"""Largest config file."""
MAX_PARENTS = 50
"""Longest chain of ``extends``."""
_CONTAINERS = ("model_type", "dict_type", "list_type")
"""Errors of a text in place of a section, mapping or list: it may be the key of a service."""

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_UNCLOSED = re.compile(r"\$\{\w+(?::-[^}]*)?$")
LONGEST_SHOWN = 200
"""Characters of a refused value that a message shows."""


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply overrides, validate.

    Args:
        path: YAML file, or ``@name`` for a shipped config; None: only defaults.
        overrides: ``dotted.key=value`` strings; the value is read as YAML.

    Raises:
        ConfigError: naming each wrong key, its value, what was expected, and the nearest valid key.
    """
    values = _read_file(_path(str(path)), seen=()) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    return resolve(values)


def read_config(path: Path, overrides: Sequence[str] | None = None) -> Config:
    """Read the config that a command names: a YAML file, or the one in a run's folder.

    A folder that was moved or copied is the run that the command reads and writes, whatever run.dir
    its config.yaml was written with.
    """
    if not os.path.isdir(path):  # False also for a name that is too long, where Path would raise
        return load(path, overrides or [])
    saved = path / "config.yaml"
    if not saved.is_file():
        raise ConfigError(
            f"{path} is not the folder of a run: it has no config.yaml. Name a YAML file"
        )
    config = load(saved, overrides or [])
    is_given = any(override.startswith("run.dir=") for override in overrides or [])
    if is_given or Path(config.run.dir).resolve() == path.resolve():
        return config
    run = config.run.model_copy(update={"dir": str(path.absolute())})
    return config.model_copy(update={"run": run})


def resolve(values: Mapping[str, object]) -> Config:
    """Validate a nested mapping.

    Raises:
        ConfigError: listing everything that is wrong with it.
    """
    try:
        config = Config.model_validate(_interpolate(plain(dict(values), "The config"), ()))
    except ValidationError as error:
        lines = [_describe(detail) for detail in error.errors()]
        raise ConfigError(
            "The config is not valid:\n" + "\n".join(f"  {line}" for line in lines)
        ) from None
    if found := [".".join(path) for path in secret_keys(config.model_dump())]:
        raise ConfigError(
            f"{', '.join(found)}: a login or key stands here, and the config is written to "
            "run.dir. Leave it out: export it (HF_TOKEN, AWS_..., or what the library reads), or "
            "log in with the library's own command"
        )
    return config


def dump(config: Config) -> str:
    """Return the resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a config class, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for section in sections_of(field.annotation):
            yield from keys(section, f"{prefix}{name}.")


def sections_of(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the section classes in a field's type, also inside lists and unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections_of(part)


def _read_file(path: Path, seen: tuple[Path, ...]) -> Values:
    try:
        path = path.resolve()
        if path in seen:
            raise ConfigError(f"{path} extends itself through {' -> '.join(map(str, seen))}")
        if not path.is_file():
            raise ConfigError(
                f"Config file {path} does not exist; name a YAML file or the folder of a run"
            )
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes; it is no config")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    except (OSError, ValueError, RuntimeError) as error:  # no permission; NUL, length; links
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"Config file {str(path)[:200]!r} cannot be read: {reason}") from None
    values = parsed(text, str(path))
    if values is None:
        return {}
    if not is_mapping(values):
        raise ConfigError(
            f"{path} must be a mapping of keys to values, got a {type(values).__name__}"
        )
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends must be the name of one file, got {parent!r}")
    if len(seen) > MAX_PARENTS:
        raise ConfigError(f"{path} has more than {MAX_PARENTS} parents through extends")
    # Joined to an absolute path, that path stays as it is.
    return _merge(_read_file(path.parent / _path(parent), (*seen, path)), values)


def _path(name: str) -> Path:
    return located(name) if name.startswith("@") else Path(os.path.expanduser(name))


def _merge(below: Values, above: Values) -> Values:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if is_mapping(old) and is_mapping(value) else value
    return merged


def _apply_override(values: Values, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"Override {masked(override)!r} must have the form dotted.key=value")
    value = parsed(text, f"Override {key}: the value")
    *sections, leaf = key.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        below = values[section]
        if not is_mapping(below):
            raise ConfigError(f"Override {key}: {section} is a value, not a section")
        values = below
    values[leaf] = value


def _interpolate(value: object, key: tuple[str, ...]) -> object:
    if is_mapping(value):
        return {name: _interpolate(item, (*key, str(name))) for name, item in value.items()}
    if is_list(value):
        return [_interpolate(item, key) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        default: str | None = match.group(2)
        text = os.environ.get(name, default)
        if text is None:
            raise ConfigError(
                f"{'.'.join(key)}: environment variable {name} is not set; "
                f"export it, or write ${{{name}:-default}}"
            )
        if name in os.environ and is_secret(name, text):
            raise ConfigError(
                f"{'.'.join(key)}: ${{{name}}} is a secret by its name, and the config is written "
                "to run.dir; leave it in the environment, which the run's processes inherit"
            )
        return text

    if unclosed := _UNCLOSED.search(value):
        raise ConfigError(f"{'.'.join(key)}: {unclosed[0][:80]!r} lacks its closing brace")
    return _VARIABLE.sub(replace, value)


def _describe(detail: ErrorDetails) -> str:
    key, value = ".".join(str(part) for part in detail["loc"]), detail["input"]
    shown = _shown(detail)
    if detail["type"] == "extra_forbidden":
        if hints := alias_hints(key, value, set(keys())):
            return f"{key}: unknown key. " + "\n    ".join(hints)
        return f"{key}: unknown key ({_kind(key, value)}). {_nearest(key)}"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if detail["type"] == "model_type" and (hints := alias_hints(key, value, set(keys()))):
        return f"{key}: {message}, got {masked(value)!r}. {hints[0]}"
    return f"{key}: {message}, got {shown}"


def _kind(key: str, value: object) -> str:
    """Describe the value of an unknown key, which may be a secret; so may the number of a few."""
    is_shown = isinstance(value, int | float) and not is_secret(key.rpartition(".")[2], value)
    return f"value {value}" if is_shown else f"a {type(value).__name__}"


def _shown(detail: ErrorDetails) -> str:
    """Return a refused value as messages show it: short, and without secrets."""
    if isinstance(detail["input"], str) and detail["type"] in _CONTAINERS:
        return f"a text of {len(detail['input'])} characters"
    name = next((part for part in reversed(detail["loc"]) if isinstance(part, str)), "")
    text = repr(masked(detail["input"], name))
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}... ({len(text)} long)"


def _nearest(key: str) -> str:
    known = sorted(set(keys()), key=lambda name: (name.count("."), name))
    leaf = key.rpartition(".")[2]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near += [name for name in known if name.rpartition(".")[2] == leaf][:3]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    unique = list(dict.fromkeys(near))
    return f"Did you mean {' or '.join(unique)}?" if unique else "See docs/config.md"
