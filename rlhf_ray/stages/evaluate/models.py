"""The models that the stage evaluate compares, each an adapter on the run's SFT model."""

import hashlib
from pathlib import Path

from rlhf_ray.driver.checkpoint import SavedCommit, kept_versions
from rlhf_ray.engines.served_adapters import tensors_from_bytes, tensors_to_bytes
from rlhf_ray.errors import DataError
from rlhf_ray.models import folders
from rlhf_ray.models.folders import safetensors_files
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.runs.models import MOST_NAMED, shortened

SFT = "sft"
"""Name of the model that all others are compared with; a zero adapter stands for it."""
WEIGHTS = "adapter_model.safetensors"

AdapterFiles = dict[str, bytes]


def compared_models(folder: RunFolder, newest: SavedCommit | None) -> dict[str, AdapterFiles]:
    """Return every model's adapter files by the name that the config gives it, sft first.

    Raises:
        DataError: a model is missing or does not fit the SFT model, or there is none but sft.
    """
    own: dict[str, AdapterFiles] = {}
    if folder.summary("dpo") is not None:
        own["dpo"] = _read(folder.path / "dpo" / "model")
    if newest:
        own["ppo"] = newest.policy
    names = folder.config.evaluate.models
    if names is None:
        trained = own
    else:
        trained = {
            name: own.get(name) or _named(folder, name, own) for name in names if name != SFT
        }
    if not trained:
        _refuse_sft_alone(folder, own)
    return {SFT: _zero_adapter(next(iter(trained.values()))), **trained}


def _named(folder: RunFolder, name: str, own: dict[str, AdapterFiles]) -> AdapterFiles:
    """Read a commit (``ppo@<version>``), or an adapter's folder."""
    is_commit = name.startswith("ppo@")
    commit = folder.path / "checkpoints" / name.partition("@")[2] / "policy"
    path = commit if is_commit else Path(name)
    if not path.is_dir():
        raise DataError(
            f"evaluate.models names {name}, which is neither a model of the run nor a folder. The "
            f"run has {_existing(folder, own)}"
        )
    if not is_commit:
        _require_fit(path, folder.sft_model())
    return _read(path)


def _refuse_sft_alone(folder: RunFolder, own: dict[str, AdapterFiles]) -> None:
    if folder.config.evaluate.models is None:
        raise DataError(
            f"{folder.path}/checkpoints holds no policy: run the stage ppo first, or dpo"
        )
    raise DataError(
        "evaluate.models names sft alone, which leaves nothing to compare; the run has "
        f"{_existing(folder, own)}"
    )


def _existing(folder: RunFolder, own: dict[str, AdapterFiles]) -> str:
    commits = folder.path / "checkpoints"
    best = ["ppo@best"] if (commits / "best").exists() else []
    kept = kept_versions(commits)
    versions = [f"ppo@{version}" for version in kept]
    if len(kept) > MOST_NAMED:
        versions = [f"ppo@VERSION ({shortened(kept)})"]
    return ", ".join([SFT, *own, *versions, *best])


def _read(path: Path) -> AdapterFiles:
    return {name: (path / name).read_bytes() for name in (folders.ADAPTER_CONFIG, WEIGHTS)}


def _require_fit(path: Path, sft_model: str) -> None:
    """Refuse what is no adapter trained on the SFT model: it would be served on another base."""
    named = f"evaluate.models names {path}"
    if not (folders.is_adapter(str(path)) and (path / WEIGHTS).is_file()):
        raise DataError(
            f"{named}, which is no adapter ({folders.ADAPTER_CONFIG} and {WEIGHTS}); models are "
            "compared as adapters on the run's SFT model"
        )
    task, base = folders.adapter_task(str(path)), folders.base_of(str(path))
    if task != "CAUSAL_LM":
        raise DataError(f"{named}, an adapter with task_type {task}; CAUSAL_LM is needed")
    if not _is_same_model(base, sft_model):
        raise DataError(
            f"{named}, an adapter on {base}, which is not the run's SFT model {sft_model}; compare "
            "models that were trained from the same one (sft.path)"
        )


def _is_same_model(first: str, second: str) -> bool:
    """Return whether two names stand for one model: equal names, or equal weights."""
    if first == second or not (Path(first).is_dir() and Path(second).is_dir()):
        return first == second
    if Path(first).resolve() == Path(second).resolve():
        return True
    files, others = safetensors_files(first), safetensors_files(second)
    if [file.stat().st_size for file in files] != [file.stat().st_size for file in others]:
        return False
    return all(_digest(file) == _digest(other) for file, other in zip(files, others, strict=True))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _zero_adapter(files: AdapterFiles) -> AdapterFiles:
    """Make an adapter of the same shape that leaves the SFT model as it is."""
    state = tensors_from_bytes(files[WEIGHTS])
    zero = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in state.items()}
    return {**files, WEIGHTS: tensors_to_bytes(zero)}
