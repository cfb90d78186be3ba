"""RLHF on a Ray cluster: vLLM generators, DeepSpeed learners, LoRA synced every iteration."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_ray.config import Config

__version__ = "0.1.0"


def run(config: "Config") -> Path:
    """Run the stages of a config that are not finished; returns the run's folder.

    Raises:
        RlhfError: naming what went wrong, where, and the remedy.
    """
    from rlhf_ray.stages.pipeline import run as run_pipeline

    return run_pipeline(config)
