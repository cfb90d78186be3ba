"""The command merge: an adapter folded into its base, as a model that needs no peft."""

from pathlib import Path
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import folders
from rlhf_ray.models.merging import merge_adapter
from rlhf_ray.stages.run_folder import RunFolder


def run(config: Config) -> dict[str, Any]:
    """Merge the run's newest policy adapter; write ``merge/model``.

    Returns:
        The summary: adapter, base, model, and the share of the changed weights that survived
        rounding.

    Raises:
        DataError: the run has no policy yet.
    """
    run_folder = RunFolder(config)
    adapter = run_folder.path / "checkpoints" / "latest" / "policy"
    if not adapter.is_dir():
        raise DataError(f"{adapter} does not exist: run the stage ppo first")
    summary = merge_folders(adapter, run_folder.stage("merge") / "model", config.model)
    run_folder.write_summary("merge", summary)
    return summary


def merge_folders(adapter: str | Path, out: str | Path, settings: ModelConfig) -> dict[str, Any]:
    """Merge any PEFT folder into the base that it names.

    Args:
        adapter: PEFT folder of a causal LM or of a sequence-classification model.
        out: folder to write; replaced whole when it exists.
        settings: data type of the result, and loading arguments.

    Raises:
        DataError: the adapter or its base cannot be loaded.
    """
    if not folders.is_adapter(str(adapter)):
        raise DataError(f"{adapter} is not an adapter: it has no {folders.ADAPTER_CONFIG}")
    base = folders.base_of(str(adapter))
    survived = merge_adapter(base, str(adapter), out, settings)
    return {"adapter": str(adapter), "base": base, "model": str(out), "survived": survived}
