"""The models of a run by name: what export, generate, chat and serve are asked for."""

from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.config.stages import POLICIES
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models import folders
from rlhf_ray.runs.folder import RunFolder


@dataclass(frozen=True)
class RunModel:
    """One model.

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
        """The model that an adapter lies on; a whole model is its own."""
        base = folders.base_of(self.path) if self.is_adapter else self.path
        return str(Path(base).resolve()) if Path(base).is_dir() else base


def find_model(config: Config, name: str) -> RunModel:
    """A model of the run, or one at a path.

    Args:
        config: the run's.
        name: sft, dpo, reward, ppo (its latest commit; ppo@best and ppo@7 are others); or a model
            folder, a PEFT folder, a hub name.

    Raises:
        DataError: the run has no such model yet, or nothing is at the path.
        ConfigError: the run neither made the SFT model nor was given one.
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
    """Every language model that the run has, sft first.

    Raises:
        DataError: it has none.
    """
    found = []
    for name in POLICIES:
        try:
            found.append(find_model(config, name))
        except (DataError, ConfigError):
            continue
    if not found:
        raise DataError(
            f"{RunFolder(config).path} holds no language model yet: run the stage sft, dpo or ppo, "
            "or set sft.path or model.path"
        )
    return found


def _made(folder: Path, stage: str) -> str:
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: run the stage {stage} first")
    return str(folder)
