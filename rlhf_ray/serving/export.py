"""The command export: writes one of a run's models with its card, for other tools and people."""

import json
import shutil
from pathlib import Path
from typing import Literal, TypedDict

from rlhf_ray.config import Config
from rlhf_ray.config.stages import POLICIES
from rlhf_ray.disk import unwritable_is_an_error
from rlhf_ray.errors import ConfigError
from rlhf_ray.models import folders
from rlhf_ray.models.merging import merge_adapter
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.lineage import lineage
from rlhf_ray.runs.models import RunModel, find_model
from rlhf_ray.serving.model_card import WRITTEN_BY, Exported, model_card

Kind = Literal["adapter", "merged"]


class ExportSummary(TypedDict):
    """Result of an export."""

    folder: str
    kind: Kind
    survived: float | None
    """Share of a merged adapter's changed weights that differ from the base's after rounding."""


_NOT_COPIED = ("learner.safetensors", folders.BASE_MODEL, "README.md")
"""Files beside a model that are of no use elsewhere, or that the export writes itself."""

EXPORTED = (*POLICIES, "reward")
"""The models of a run that can be exported."""


def run(
    config: Config, *, model: str = "ppo", kind: Kind = "adapter", out: Path | None = None
) -> ExportSummary:
    """Write a folder that transformers, peft and vLLM can load, with a README.md.

    Args:
        config: the run's.
        model: sft, dpo, ppo (ppo@best, ppo@7) or reward.
        kind: the adapter alone, or a whole model.
        out: folder to write, replaced if it is an earlier export; None:
            ``export/<model>-<kind>`` in the run's folder.

    Raises:
        DataError: the run has no such model yet.
        ConfigError: the model is no stage's, or no adapter though ``kind`` is adapter; or the
            folder cannot be written, or holds other things.
    """
    name = model.partition("@")[0]
    if name not in EXPORTED:
        raise ConfigError(f"export takes {', '.join(EXPORTED)} (or ppo@best, ppo@7), got {model!r}")
    chosen = find_model(config, model)
    run_folder = RunFolder(config)
    target = out or run_folder.stage("export") / f"{model.replace('@', '-')}-{kind}"
    _check_replaceable(target)
    survived = None
    with unwritable_is_an_error(target):
        if kind == "adapter":
            source = _adapter_of(config, chosen)
            _copy(source, target, adapter=True)
        elif chosen.is_adapter:
            source = chosen
            survived = merge_adapter(chosen.base, chosen.path, target, config.model)
        else:
            source = chosen
            _copy(chosen, target, adapter=False)
        card = model_card(
            Exported(
                title=f"{config.run.name}: {model}",
                folder=str(target),
                task="SEQ_CLS" if name == "reward" else "CAUSAL_LM",
                base=source.base if kind == "adapter" else None,
                survived=survived,
                dtype=config.model.dtype,
            ),
            lineage(config, name, _version(chosen) if name == "ppo" else None),
        )
        (target / "README.md").write_text(card, encoding="utf-8")
    return {"folder": str(target), "kind": kind, "survived": survived}


def _version(policy: RunModel) -> str:
    """Return the name of a commit's folder; ``latest`` and ``best`` are links to it."""
    return Path(policy.path).resolve().parent.name


def _adapter_of(config: Config, model: RunModel) -> RunModel:
    """Return the model itself, or the adapter that SFT trained and merged into it."""
    if model.is_adapter:
        return model
    trained = RunFolder(config).path / "sft" / "adapter"
    if model.name == "sft" and not config.sft.path and folders.is_adapter(str(trained)):
        return RunModel(model.name, str(trained))
    raise ConfigError(
        f"{model.path} is a whole model, all of whose weights were trained, so it has no "
        "adapter; export it with --kind merged"
    )


def _check_replaceable(target: Path) -> None:
    """Refuse to replace anything but an earlier export, which its card shows."""
    card = target / "README.md"
    is_export = card.is_file() and WRITTEN_BY in card.read_text(encoding="utf-8", errors="replace")
    if target.exists() and not is_export and (target.is_file() or any(target.iterdir())):
        raise ConfigError(
            f"{target} holds other things than an earlier export; give a new or an empty folder"
        )


def _copy(model: RunModel, target: Path, *, adapter: bool) -> None:
    """Copy a folder's files, all or none; an adapter's config gets the path of its base."""
    if not Path(model.path).is_dir():
        raise ConfigError(f"{model.path} is on the model hub already; there is nothing to export")
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for file in sorted(Path(model.path).iterdir()):
        if file.is_file() and file.name not in _NOT_COPIED:
            shutil.copyfile(file, temporary / file.name)
    if adapter:
        settings = temporary / folders.ADAPTER_CONFIG
        values = json.loads(settings.read_text(encoding="utf-8"))
        values["base_model_name_or_path"] = model.base
        settings.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    if adapter and Path(model.base).is_dir():
        folders.record_base(target, model.base)
