"""The command merge: an adapter folded into its base, as a model that needs no peft."""

from pathlib import Path
from typing import Any

from rlhf_ray.config import Config
from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import folders
from rlhf_ray.models.merging import merge_adapter
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.models import find_model


def run(config: Config, model: str = "ppo") -> dict[str, Any]:
    """Merge an adapter of the run into its base; write ``merge/model``.

    Args:
        config: the run's.
        model: ppo (its latest commit; ppo@best and ppo@7 are others), dpo, reward; or a PEFT
            folder.

    Returns:
        The summary: adapter, base, model, and the share of the changed weights that survived
        rounding.

    Raises:
        DataError: the run has no such model yet, or it is no adapter.
    """
    run_folder = RunFolder(config)
    adapter = find_model(config, model).path
    summary = merge_folder(adapter, run_folder.stage("merge") / "model", config.model)
    run_folder.write_summary("merge", summary)
    return summary


def merge_folder(adapter: str | Path, out: str | Path, settings: ModelConfig) -> dict[str, Any]:
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
