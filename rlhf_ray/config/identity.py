"""The identity of a run: the config keys that must stay the same for it to resume."""

from collections.abc import Iterator, Mapping, Sequence

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_ray.config.load import sections_of
from rlhf_ray.config.root import Config
from rlhf_ray.config.section import is_list, is_mapping
from rlhf_ray.config.stages import STAGES


def differences(
    saved: Mapping[str, object], config: Config, begun: Sequence[str]
) -> list[tuple[str, object, object]]:
    """Return the fixed keys of begun stages that changed, as (key, saved value, value now)."""
    now = config.model_dump(mode="json")
    sections = {section for stage in begun for section in STAGES[stage].sections}
    changed: list[tuple[str, object, object]] = []
    for key in fixed_keys(Config):
        if key.partition(".")[0] not in sections:
            continue
        old, new = (_fixed_part(key, _look_up(values, key)) for values in (saved, now))
        if old != new:
            changed.append((key, old, new))
    return changed


def fixed_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys that are not declared changeable."""
    for name, field in model.model_fields.items():
        if _may_change(field):
            continue
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fixed_keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _may_change(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return is_mapping(extra) and bool(extra.get("may_change"))


def _fixed_part(key: str, value: object) -> object:
    """Return a list of sections without its changeable keys; any other value unchanged."""
    if not is_list(value) or key not in Config.model_fields:
        return value
    changeable = {
        name
        for section in sections_of(Config.model_fields[key].annotation)
        for name, field in section.model_fields.items()
        if _may_change(field)
    }
    return [
        {name: part for name, part in item.items() if name not in changeable}
        for item in value
        if is_mapping(item)
    ]


def _look_up(values: Mapping[str, object], key: str) -> object:
    value: object = values
    for part in key.split("."):
        value = value.get(part) if is_mapping(value) else None
    return value
