"""The command merge: writes an adapter merged into its base, a model that needs no peft."""

from typing import TypedDict

from rlhf_ray.config import Config
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
    """
    run_folder = RunFolder(config)
    adapter, out = find_model(config, model), run_folder.stage("merge") / "model"
    survived = merge_adapter(adapter.base, adapter.path, out, config.model)
    summary: MergeSummary = {
        "adapter": adapter.path,
        "base": adapter.base,
        "model": str(out),
        "survived": survived,
    }
    run_folder.write_summary("merge", summary)
    return summary
