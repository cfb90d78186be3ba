"""Configs that differ from a given one in some keys."""

from collections.abc import Mapping
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.config.load import resolve

Change = Mapping[str, Any]
"""Config keys and what they would be."""

BASE_AS_REFERENCE: Change = {"reference.kind": "policy_base", "reference.num_workers": 1}
"""The policy's base doubles as the reference."""


def changed(config: Config, change: Change) -> Config:
    """The config with a change.

    Raises:
        ConfigError: it is not valid then.
    """
    values = config.model_dump(mode="json")
    for key, value in change.items():
        section = values
        *path, name = key.split(".")
        for part in path:
            section = section[part]
        section[name] = value
    return resolve(values)
