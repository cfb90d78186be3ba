"""Where a run's files are, and which model or data set a stage reads."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config import Config
from rlhf_ray.config.rewards import (
    ClassifierSourceConfig,
    FunctionSourceConfig,
    ModelSourceConfig,
    RewardSourceConfig,
)
from rlhf_ray.errors import ConfigError, DataError, RlhfError

if TYPE_CHECKING:
    from datasets import Dataset

CHECKPOINTS = "trainer/checkpoint-*"
"""Where the supervised stages keep what an unfinished training goes on from."""

LEAST_FREE_BYTES = 2**20
"""Less free space than this counts as a full disk."""


class RunFolder:
    """Paths under ``run.dir``; models and data by what the config or earlier stages give."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.run.dir).absolute()
        self.saved = self.path / "config.yaml"

    def make(self) -> None:
        """Make the folder when missing, for its owner alone.

        Raises:
            ConfigError: it cannot be written.
        """
        with unwritable_is_an_error(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def stage(self, name: str) -> Path:
        """Folder of a stage; made when missing.

        Raises:
            ConfigError: the run folder cannot be written.
        """
        if not self.path.is_dir():
            self.make()
        folder = self.path / name
        with unwritable_is_an_error(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def summary(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage left, or None while it has not finished."""
        path = self.path / stage / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_summary(self, stage: str, summary: dict[str, Any]) -> None:
        """Mark a stage as finished: written whole or not at all, as the stage's last act."""
        write_atomically(self.stage(stage) / "summary.json", json.dumps(summary, indent=2) + "\n")

    def has_begun(self, stage: str) -> bool:
        """Whether a stage left something that a run which goes on would build on."""
        parts = [(self.path / stage).glob(name) for name in ("summary.json", CHECKPOINTS)]
        if stage == "ppo":
            parts.append((self.path / "checkpoints").glob("*/state.json"))
        return any(True for part in parts for _ in part)

    def dataset(self, name: str) -> Path:
        """One of the sets that prepare writes: finetune, reward, rl, evaluation.

        Raises:
            DataError: prepare has not run.
        """
        folder = self.path / "prepare" / name
        if not folder.is_dir():
            raise DataError(
                f"{folder} does not exist: run the stage prepare first, or name your set in data.*"
            )
        return folder

    def rows(self, name: str) -> "Dataset":
        """The rows of a set that prepare wrote.

        Raises:
            DataError: prepare has not run.
        """
        from datasets import Dataset, load_from_disk

        rows = load_from_disk(str(self.dataset(name)))
        assert isinstance(rows, Dataset)
        return rows

    def base_model(self) -> str:
        """The base that pretrain and SFT start from: model.path, or the tiny model."""
        return absolute(self.config.model.path or str(self.path / "pretrain" / "base"))

    def pretrained_model(self) -> str:
        """What SFT starts from: pretrain's result where that stage ran, else the base."""
        result = self.path / "pretrain" / "model"
        if self.summary("pretrain") is not None:
            return str(result)
        return self._given("model.path", self.config.model.path, "pretrain")

    def sft_model(self) -> str:
        """What PPO starts from: sft.path, SFT's merged result, or the base as it is."""
        if self.config.sft.path:
            return absolute(self.config.sft.path)
        if self.summary("sft") is not None:
            return str(self.path / "sft" / "model")
        return self._given("sft.path or model.path", self.config.model.path, "sft")

    def reward_model(self) -> str | None:
        """The run's reward model: reward.path, or the reward stage's result; None: not needed."""
        if not self.config.needs_reward_model:
            return None
        if self.config.reward.path:
            return absolute(self.config.reward.path)
        if self.summary("reward") is not None:
            return str(self.path / "reward" / "model")
        return self._given("reward.path", None, "reward")

    def critic_model(self) -> str:
        """What the critic starts from: critic.path, or what critic.init names."""
        critic = self.config.critic
        if critic.path:
            return absolute(critic.path)
        reward_model = self.reward_model() if critic.init == "reward" else None
        return reward_model or self.sft_model()

    def _given(self, key: str, value: str | None, stage: str) -> str:
        if value is None:
            raise ConfigError(
                f"No model for this stage: {self.path / stage} holds no finished stage {stage} and "
                f"{key} is not set; run the stage {stage}, or set {key}"
            )
        return absolute(value)


def absolute(model: str) -> str:
    """A local folder by absolute path (a role's process runs elsewhere); a hub name as it is."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def located_function(spec: str) -> str:
    """A function's file by absolute path; a module, or a name of ours, as it is."""
    where, _, name = spec.rpartition(":")
    return f"{Path(where).absolute()}:{name}" if where.endswith(".py") else spec


def located(source: RewardSourceConfig) -> RewardSourceConfig:
    """A reward source whose model or file is named by absolute path."""
    if isinstance(source, FunctionSourceConfig):
        return source.model_copy(update={"function": located_function(source.function)})
    if isinstance(source, ModelSourceConfig | ClassifierSourceConfig) and source.path:
        return source.model_copy(update={"path": absolute(source.path)})
    return source


def write_atomically(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        ConfigError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with unwritable_is_an_error(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


@contextmanager
def unwritable_is_an_error(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into one clear message."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"Cannot write {path}: {error.strerror or error}. Free space or choose another "
            "run.dir; what was written before is kept and the run can be continued"
        ) from error


@contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """Turn whatever a library makes of a full disk into one clear message.

    Some tell it by an OSError, some by a RuntimeError without a reason, some in another process.
    """
    try:
        yield
    except Exception as error:
        told = isinstance(error, RlhfError) and error.exit_code == 2
        if told or not (_says_full(error) or shutil.disk_usage(folder).free < LEAST_FREE_BYTES):
            raise
        raise ConfigError(
            f"The disk is full ({folder}): {type(error).__name__}: {error}. Free space or choose "
            "another run.dir; what was written before is kept and the run can be continued"
        ) from error


def _says_full(error: BaseException) -> bool:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or os.strerror(errno.ENOSPC) in str(error)
