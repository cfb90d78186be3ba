"""The command merge: writes an adapter merged into its base, a model that needs no peft."""

from pathlib import Path
from typing import TypedDict

from rlhf_ray.config import Config
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import folders
from rlhf_ray.models.merging import merge_adapter
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.models import find_model


class MergeSummary(TypedDict):
    """Contents of merge/summary.json."""

    adapter: str
    base: str
    model: str
    survived: float
    """Share of the changed weights that differ from the base's after rounding."""


def run(config: Config, model: str = "ppo") -> MergeSummary:
    """Merge an adapter of the run into its base; write ``merge/model``.

    Args:
        config: the run's.
        model: ppo (its latest commit), ppo@best, ppo@7, dpo or reward; or a PEFT folder.

    Raises:
        DataError: the run has no such model yet, or it is not an adapter.
    """
    run_folder = RunFolder(config)
    adapter = find_model(config, model).path
    summary = merge_folder(adapter, run_folder.stage("merge") / "model", config.model)
    run_folder.write_summary("merge", summary)
    return summary


def merge_folder(adapter: str | Path, out: str | Path, settings: ModelConfig) -> MergeSummary:
    """Merge any PEFT folder into the base that it names.

    Raises:
        DataError: the adapter or its base cannot be loaded.
    """
    if not folders.is_adapter(str(adapter)):
        raise DataError(
            f"{adapter} is not an adapter: it has no {folders.ADAPTER_CONFIG}; give a PEFT folder"
        )
    base = folders.base_of(str(adapter))
    survived = merge_adapter(base, str(adapter), out, settings)
    return {"adapter": str(adapter), "base": base, "model": str(out), "survived": survived}
