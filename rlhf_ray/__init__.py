"""RLHF on a Ray cluster: vLLM generators, DeepSpeed learners, LoRA synced every iteration.

The surface of the library: read a config, run it, look at the run, catch what went wrong. Nothing
here loads torch before a run begins. Whoever reads the code begins with ``docs/architecture.md``.
"""

from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.config import load as load_config
from rlhf_ray.errors import (
    ActorFailure,
    CheckpointError,
    ConfigError,
    DataError,
    DivergenceError,
    PlacementError,
    RlhfError,
    WeightSyncError,
)
from rlhf_ray.library import Run
from rlhf_ray.observability.quiet import put_compiling_off
from rlhf_ray.version import __version__

put_compiling_off()


def run(config: Config) -> Path:
    """Run the unfinished stages of a config; returns the run's folder.

    Raises:
        RlhfError: naming what went wrong, where, and the remedy.
    """
    from rlhf_ray.stages.pipeline import run as run_pipeline

    return run_pipeline(config)


__all__ = [
    "ActorFailure",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "DivergenceError",
    "PlacementError",
    "RlhfError",
    "Run",
    "WeightSyncError",
    "__version__",
    "load_config",
    "run",
]
