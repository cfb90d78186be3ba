"""Typed, validated configuration. Imports no torch."""

from rlhf_ray.config.load import dump, load, resolve
from rlhf_ray.config.root import Config

__all__ = ["Config", "dump", "load", "resolve"]
