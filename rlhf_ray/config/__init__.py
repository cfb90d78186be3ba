"""The config of a run: typed sections, a file each, read from YAML and validated.

It holds the registries of stages, estimators and losses too. Imports `errors` alone, and no torch.
Read `root` first, then `load`.
"""

from rlhf_ray.config.load import dump, load, read_config, resolve
from rlhf_ray.config.root import Config

__all__ = ["Config", "dump", "load", "read_config", "resolve"]
