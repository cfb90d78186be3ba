"""What makes a run the same run when it goes on."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_ray.config.load import sections_of
from rlhf_ray.config.root import Config
from rlhf_ray.config.stages import STAGES


def differences(
    saved: Mapping[str, Any], config: Config, begun: Sequence[str]
) -> list[tuple[str, Any, Any]]:
    """Keys that may not change and did: (key, saved value, value now).

    Args:
        saved: the resolved config of the run, as in its ``config.yaml``.
        config: the config now.
        begun: stages that have begun.
    """
    now = config.model_dump(mode="json")
    sections = {section for stage in begun for section in STAGES[stage].sections}
    odd = []
    for key in fixed_keys(Config):
        if key.partition(".")[0] not in sections:
            continue
        old, new = (_fixed_part(key, _look_up(values, key)) for values in (saved, now))
        if old != new:
            odd.append((key, old, new))
    return odd


def fixed_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted keys of the fields that were not declared changeable."""
    for name, field in model.model_fields.items():
        if _may_change(field):
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fixed_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _may_change(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("may_change"))


def _fixed_part(key: str, value: Any) -> Any:
    """A list of sections without what was declared changeable; any other value as it is."""
    if not isinstance(value, list) or key not in Config.model_fields:
        return value
    changeable = {
        name
        for section in sections_of(Config.model_fields[key].annotation)
        for name, field in section.model_fields.items()
        if _may_change(field)
    }
    return [{name: part for name, part in item.items() if name not in changeable} for item in value]


def _look_up(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
