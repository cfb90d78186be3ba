"""The identity of a run: the config keys that must stay the same for it to resume."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_ray.config.load import sections_of
from rlhf_ray.config.root import Config
from rlhf_ray.config.section import is_list, is_mapping
from rlhf_ray.config.stages import STAGES

Change = tuple[str, object, object]
"""A key, its saved value, and its value now."""


def differences(
    saved: Mapping[str, object], config: Config, begun: Collection[str]
) -> list[Change]:
    """Return the fixed keys of begun stages that changed."""
    return [change for change in _changes(saved, config, _is_fixed) if is_read(change[0], begun)]


def adjustments(
    saved: Mapping[str, object], config: Config, begun: Collection[str]
) -> list[Change]:
    """Return the changed keys of begun stages that may change, but not without a record."""
    return [change for change in _changes(saved, config, _is_recorded) if is_read(change[0], begun)]


def settled(
    saved: Mapping[str, object], config: Config, changes: Sequence[Change], active: Collection[str]
) -> dict[str, object]:
    """Return the saved values that stay: the config says nothing of them, and nobody reads them.

    Args:
        saved: the run's saved config.
        config: that of now.
        changes: what `differences` and `adjustments` found.
        active: stages that are requested, or begun and not finished.
    """
    now, defaults = (each.model_dump(mode="json") for each in (config, Config()))
    return {
        key: _look_up(saved, key)
        for key, _, _ in changes
        if not is_read(key, active) and _look_up(now, key) == _look_up(defaults, key)
    }


def fixed_keys(model: type[BaseModel]) -> Iterator[str]:
    """Yield the dotted keys that are not declared changeable."""
    return _keys(model, _is_fixed)


def is_read(key: str, stages: Collection[str]) -> bool:
    """Return whether any of the stages reads a key."""
    section, _, rest = key.partition(".")
    dataset = rest.partition(".")[0]
    if section == "data" and any(dataset in stage.datasets for stage in STAGES.values()):
        return any(dataset in STAGES[stage].datasets for stage in stages)
    if section in STAGES and rest != "path":
        return section in stages  # of another stage's section a stage reads which model to take
    return any(section in STAGES[stage].sections for stage in stages)


def _changes(
    saved: Mapping[str, object], config: Config, wanted: Callable[[FieldInfo], bool]
) -> Iterator[Change]:
    now, defaults = (each.model_dump(mode="json") for each in (config, Config()))
    for key in _keys(Config, wanted):
        # A key that the run is older than: its default is what was done before there was the key.
        old = _look_up(saved if _holds(saved, key) else defaults, key)
        old, new = (_part(key, value, wanted) for value in (old, _look_up(now, key)))
        if old != new:
            yield key, old, new


def _keys(
    model: type[BaseModel], wanted: Callable[[FieldInfo], bool], prefix: str = ""
) -> Iterator[str]:
    """Yield the dotted keys that are wanted, and the lists of sections that may have such keys."""
    for name, field in model.model_fields.items():
        is_list_of_sections = not prefix and any(sections_of(field.annotation))
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            if not _has(field, "may_change"):
                yield from _keys(field.annotation, wanted, f"{prefix}{name}.")
        elif wanted(field) or is_list_of_sections:
            yield prefix + name


def _is_fixed(field: FieldInfo) -> bool:
    return not _has(field, "may_change")


def _is_recorded(field: FieldInfo) -> bool:
    return _has(field, "recorded")


def _has(field: FieldInfo, mark: str) -> bool:
    extra = field.json_schema_extra
    return is_mapping(extra) and bool(extra.get(mark))


def _part(key: str, value: object, wanted: Callable[[FieldInfo], bool]) -> object:
    """Return a list of sections with the wanted keys alone; any other value unchanged."""
    if not is_list(value) or key not in Config.model_fields:
        return value
    names = {
        name
        for section in sections_of(Config.model_fields[key].annotation)
        for name, field in section.model_fields.items()
        if wanted(field)
    }
    return [
        {name: part for name, part in item.items() if name in names}
        for item in value
        if is_mapping(item)
    ]


def _holds(values: object, key: str) -> bool:
    """Return whether a key, or a section of it that is set to null, is given."""
    first, _, rest = key.partition(".")
    if not is_mapping(values):
        return values is None
    return first in values and (not rest or _holds(values[first], rest))


def _look_up(values: Mapping[str, object], key: str) -> object:
    value: object = values
    for part in key.split("."):
        value = value.get(part) if is_mapping(value) else None
    return value
