"""Find a run's models by name, for export, generate, chat and serve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.config.stages import POLICIES
from rlhf_ray.driver.checkpoint import kept_versions
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import folders
from rlhf_ray.runs.folder import RunFolder

MOST_NAMED = 12
"""Versions that a message names one by one."""


@dataclass(frozen=True)
class RunModel:
    """A model of a run, or one at a path.

    Attributes:
        name: sft, dpo, ppo, reward; or the folder's own name.
        path: model folder, PEFT folder or hub name.
    """

    name: str
    path: str

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT folder."""
        return folders.is_adapter(self.path)

    @property
    def base(self) -> str:
        """The base of an adapter; a whole model is its own base."""
        base = folders.base_of(self.path) if self.is_adapter else self.path
        return str(Path(base).resolve()) if Path(base).is_dir() else base


def find_model(config: Config, name: str) -> RunModel:
    """Return a model of the run, or one at a path.

    Args:
        config: the run's config.
        name: sft, dpo, reward, ppo (its latest commit; ppo@best and ppo@7 are others); or a model
            folder, a PEFT folder, a hub name.

    Raises:
        DataError: the run has no such model yet, or the path does not exist.
        ConfigError: the run has neither trained an SFT model nor been given one.
    """
    folder = RunFolder(config)
    kind, _, version = name.partition("@")
    if kind == "ppo":
        return RunModel(name, str(_version(folder.path / "checkpoints", version or "latest")))
    if name == "dpo":
        return RunModel(name, _made(folder.path / "dpo" / "model", "dpo"))
    if name == "sft":
        return RunModel(name, folders.locate(folder.sft_model()))
    if name == "reward":
        made = config.reward.path or _made(folder.path / "reward" / "model", "reward")
        return RunModel(name, folders.locate(made))
    return RunModel(Path(name).name, folders.locate(name))


def policies(config: Config) -> list[RunModel]:
    """Return every language model that the run has, in the order of the stages.

    Raises:
        DataError: it has none.
    """
    models = []
    for name in POLICIES:
        try:
            models.append(find_model(config, name))
        except (DataError, ConfigError):
            continue
    if not models:
        raise DataError(
            f"{RunFolder(config).path} holds no language model yet: run the stage sft, dpo or ppo, "
            "or set sft.path or model.path"
        )
    return models


def _version(commits: Path, version: str) -> Path:
    """Return the policy's folder of a version, which must be kept.

    Raises:
        DataError: it is not, or there is none yet; it names the nearest one.
    """
    policy, kept = commits / version / "policy", kept_versions(commits)
    if policy.is_dir() or not kept:
        return Path(_made(policy, "ppo"))
    if version == "latest":  # the file system has no links
        return commits / str(kept[-1]) / "policy"
    if version.isdigit():
        raise DataError(not_kept(commits, int(version), kept))
    raise DataError(
        f"{commits} has no version {version!r}: name latest, best or a number; it holds "
        f"{shortened(kept)}"
    )


def not_kept(commits: Path, version: int, kept: Sequence[int], what: str = "Version") -> str:
    """Return the message of a version that is gone.

    Args:
        commits: folder of the commits.
        version: the one that is wanted.
        kept: those that are there, in order; at least one.
        what: of the version is wanted.
    """
    nearest = min(kept, key=lambda known: abs(known - version))
    return (
        f"{what} {version} is not kept in {commits}; the nearest is {nearest}, of "
        f"{shortened(kept)}. ppo.keep_checkpoints and ppo.keep_adapters say what a run keeps"
    )


def shortened(versions: Sequence[int]) -> str:
    """Return versions as text; of many, how many, the first and the last."""
    if len(versions) <= MOST_NAMED:
        return ", ".join(map(str, versions))
    return f"{len(versions)} versions from {versions[0]} to {versions[-1]}"


def _made(folder: Path, stage: str) -> str:
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: run the stage {stage} first")
    return str(folder)
