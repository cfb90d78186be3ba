"""Find a run's models by name, for export, generate, chat and serve."""

from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.config.stages import POLICIES
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import folders
from rlhf_ray.runs.folder import RunFolder


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
        policy = folder.path / "checkpoints" / (version or "latest") / "policy"
        return RunModel(name, _made(policy, "ppo"))
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


def _made(folder: Path, stage: str) -> str:
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: run the stage {stage} first")
    return str(folder)
