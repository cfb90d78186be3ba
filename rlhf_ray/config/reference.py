"""Write ``docs/config.md``: every key of the config, from the section classes."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_ray.config.root import Config
from rlhf_ray.config.section import is_list, is_mapping

Schema = Mapping[str, Any]

_HEAD = """# Config

Every key, generated from `rlhf_ray/config/` by `scripts/docs.sh`. A config is a YAML file; on the
command line a key is written with dots: `rlhf-ray run FILE ppo.epochs=2`. A file may name a parent
in `extends: other.yaml`, whose keys it overrides; `${NAME}` and `${NAME:-default}` in a string come
from the environment.

The column *resume* says whether the value *may change* when a run resumes, or is *fixed* once a
stage that reads the key has begun. *recorded*: it may change, and a change is recorded in the run's
`changes.jsonl`. What other systems call these keys:
[other_names.md](other_names.md).
"""

_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} long",
    "minItems": "at least {} of them",
    "maxItems": "at most {} of them",
}
_NAMES = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "`true` or `false`",
    "null": "`null`",
}


def markdown() -> str:
    """Return the whole of ``docs/config.md``."""
    schema = Config.model_json_schema()
    sections = schema["$defs"]
    lines = [_HEAD]
    for name, keys in _places(schema).items():
        kind = sections[name]["properties"].get("type", {}).get("const")
        title = ", ".join(f"`{key}`" for key in keys) + (f" of type `{kind}`" if kind else "")
        lines += [f"## {title}", ""]
        lines += [sections[name].get("description", ""), ""]
        lines += ["| key | type | unit | default | resume | meaning |", "|---|---|---|---|---|---|"]
        lines += [_row(key, entry, sections) for key, entry in _properties(sections[name])]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _places(schema: Schema) -> dict[str, list[str]]:
    """Return section class -> the dotted keys that hold it, in the order of the config."""
    places: dict[str, list[str]] = {}

    def visit(section: Schema, prefix: str) -> None:
        for key, entry in _properties(section):
            firsts: dict[str, str] = {}  # a section that a list may hold too is named once
            for name, suffix in _references(entry):
                firsts.setdefault(name, suffix)
            for name, suffix in firsts.items():
                places.setdefault(name, []).append(f"{prefix}{key}{suffix}")
                visit(schema["$defs"][name], f"{prefix}{key}{suffix}.")

    visit(schema, "")
    return places


def _properties(section: Schema) -> Iterator[tuple[str, Schema]]:
    yield from section.get("properties", {}).items()


def _references(entry: Schema, suffix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the section classes that a value may be, each with a suffix for its key."""
    if "$ref" in entry:
        yield _class_name(entry), suffix
    for option in _options(entry):
        yield from _references(option, suffix)
    if "items" in entry:
        yield from _references(entry["items"], f"{suffix}[]")
    if isinstance(entry.get("additionalProperties"), Mapping):
        yield from _references(entry["additionalProperties"], f"{suffix}.NAME")


def _options(entry: Schema) -> list[Schema]:
    return [*entry.get("anyOf", ()), *entry.get("oneOf", ()), *entry.get("allOf", ())]


def _class_name(entry: Schema) -> str:
    return entry["$ref"].rpartition("/")[2]


def _row(key: str, entry: Schema, sections: Schema) -> str:
    may_change = "may change" if entry.get("may_change") else "fixed"
    if entry.get("recorded"):
        may_change = "recorded"
    is_section = "$ref" in entry
    cells = (
        f"`{key}`",
        _kind(entry),
        entry.get("unit", ""),
        _default(entry, sections),
        "" if is_section else may_change,
        entry.get("description", "").replace("<", "\\<"),
    )
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _kind(entry: Schema) -> str:
    """Return the type and bounds of a value in words."""
    if "$ref" in entry:
        return "section"
    if "const" in entry:
        return f"`{_value(entry['const'])}`"
    if "enum" in entry:
        return " or ".join(f"`{_value(value)}`" for value in entry["enum"])
    options = _options(entry)
    if options:
        return " or ".join(dict.fromkeys(_kind(option) for option in options))
    if entry.get("type") == "array":
        name = f"list of ({_kind(entry['items'])})" if "items" in entry else "list"
    elif entry.get("type") == "object":
        value: Schema | bool | None = entry.get("additionalProperties")
        name = f"mapping to {_kind(value)}" if isinstance(value, Mapping) and value else "mapping"
    else:
        name = _NAMES.get(entry.get("type", ""), "any")
    bounds = [
        text.format(_value(entry[bound])) for bound, text in _BOUNDS.items() if bound in entry
    ]
    return ", ".join([name, *bounds])


def is_number(entry: Schema) -> bool:
    """Return whether a value may be a number."""
    return entry.get("type") in ("integer", "number") or any(map(is_number, _options(entry)))


def _default(entry: Schema, sections: Schema) -> str:
    if "default" not in entry:
        return "required"
    default = entry["default"]
    if "$ref" in entry:  # show only what differs from the section's own defaults
        own = dict(_properties(sections[_class_name(entry)]))
        default = {key: value for key, value in default.items() if value != own[key].get("default")}
        return f"`{_value(default)}`" if default else ""
    return f"`{_value(default)}`"


def _value(value: object) -> str:
    """Return a value as YAML."""
    if isinstance(value, str) and value:
        return value
    if is_mapping(value):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.items()) + "}"
    if is_list(value):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value)
