"""The folder of a run: where its files are, and which model or data set a stage reads."""

import json
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config import Config
from rlhf_ray.config.identity import Change
from rlhf_ray.config.rewards import (
    ClassifierSourceConfig,
    FunctionSourceConfig,
    ModelSourceConfig,
    RewardSourceConfig,
)
from rlhf_ray.disk import DAMAGE, unwritable_is_an_error, write_atomically
from rlhf_ray.errors import CheckpointError, ConfigError, DataError
from rlhf_ray.observability.sinks import read_jsonl

if TYPE_CHECKING:
    from datasets import Dataset

CHANGES = "changes.jsonl"
"""What was changed on resume, and when."""
ORIGIN = "branch.json"
"""The commit of another run from which this one started."""
CHECKPOINTS = "trainer/checkpoint-*"
"""Checkpoints from which the supervised stages resume an unfinished training."""


class RunFolder:
    """Paths under ``run.dir``, and the models and data that the config or earlier stages give."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = Path(config.run.dir).absolute()
        self.saved = self.path / "config.yaml"

    def make(self) -> None:
        """Create the folder if missing, readable by its owner alone; so is an empty one made.

        A folder that holds something keeps its mode: its owner may have let others in, and a home
        or data folder must not be closed to them.

        Raises:
            ConfigError: it cannot be written, or others could have put files there.
        """
        with unwritable_is_an_error(self.path):
            # Through a link whose target is missing, such as one to scratch storage.
            Path(os.path.realpath(self.path)).mkdir(mode=0o700, parents=True, exist_ok=True)
            self.require_own()
            mode = self.path.stat().st_mode
            # Files of a setgid folder that is closed to others go to a team, on purpose.
            is_shared = mode & stat.S_ISGID and not mode & stat.S_IRWXO
            if not (is_shared or any(self.path.iterdir())):
                self.path.chmod(0o700)

    def require_own(self) -> None:
        """Refuse a folder of another user, or one that everybody can write to.

        Raises:
            ConfigError: what is read there may be another user's: configs, models, commits.
        """
        if not os.path.exists(self.path):
            return
        found = self.path.stat()
        if found.st_uid == os.getuid() and not found.st_mode & stat.S_IWOTH:
            return
        new = _new_file(self.path)
        if found.st_uid != os.getuid() and not (new and new.st_uid == found.st_uid):
            raise ConfigError(
                f"run.dir {self.path} belongs to another user (uid {found.st_uid}, you are "
                f"{os.getuid()}); set run.dir to a folder of yours, such as one inside it"
            )
        if found.st_mode & stat.S_IWOTH and not (new and new.st_mode & stat.S_IWOTH):
            raise ConfigError(
                f"run.dir {self.path} can be written by everybody (mode "
                f"{stat.S_IMODE(found.st_mode):o}); set run.dir to a folder inside it, or chmod "
                "o-w it"
            )

    def stage(self, name: str) -> Path:
        """Return the folder of a stage, created if missing."""
        if self.path.is_dir():
            self.require_own()
        else:
            self.make()
        folder = self.path / name
        with unwritable_is_an_error(folder):
            folder.mkdir(exist_ok=True)
        return folder

    def summary(self, stage: str) -> dict[str, Any] | None:
        """Return the summary of a finished stage; None if it has not finished.

        Raises:
            CheckpointError: it is damaged.
        """
        path = self.path / stage / "summary.json"
        if not path.exists():
            return None
        try:
            return {**json.loads(path.read_text(encoding="utf-8"))}
        except (*DAMAGE, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); restore it, or remove it to run the stage again"
            ) from error

    def write_summary(self, stage: str, summary: Mapping[str, object]) -> None:
        """Write the summary, which marks the stage as finished: the last thing that it does."""
        write_atomically(self.stage(stage) / "summary.json", json.dumps(summary, indent=2) + "\n")

    def has_begun(self, stage: str) -> bool:
        """Return whether a stage left something that a resumed run would build on."""
        patterns = [f"{stage}/summary.json", f"{stage}/{CHECKPOINTS}"]
        patterns += ["checkpoints/*/state.json"] * (stage == "ppo")
        return any(True for pattern in patterns for _ in self.path.glob(pattern))

    def position(self, stage: str) -> int | None:
        """Return the last iteration or optimizer step that a stage has saved; None without one."""
        pattern = "checkpoints/[0-9]*/state.json"
        if stage != "ppo":
            pattern = f"{stage}/{CHECKPOINTS}/trainer_state.json"
        names = (path.parent.name for path in self.path.glob(pattern))
        return max((int(name.rpartition("-")[2]) for name in names), default=None)

    def changes(self) -> list[dict[str, Any]]:
        """Return the recorded changes of the config, one per resume that changed any."""
        return read_jsonl(self.path / CHANGES)

    def record_changes(
        self, changes: Sequence[Change], after: Mapping[str, int], finished: Sequence[str]
    ) -> None:
        """Append changes of the config to changes.jsonl.

        Args:
            changes: key, value before and value now.
            after: stage -> the last iteration or optimizer step that was done without them.
            finished: stages that were finished without them.

        Raises:
            ConfigError: the file cannot be written.
        """
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "finished": list(finished),
            "after": dict(after),
            "changes": {key: {"before": old, "now": new} for key, old, new in changes},
        }
        path = self.path / CHANGES
        with unwritable_is_an_error(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def dataset(self, name: str) -> Path:
        """Return the folder of a set that prepare writes: finetune, reward, rl or evaluation.

        Raises:
            DataError: prepare has not run.
        """
        folder = self.path / "prepare" / name
        if not folder.is_dir():
            raise DataError(
                f"{folder} does not exist: run the stage prepare first, or set data.* to your "
                "dataset"
            )
        return folder

    def rows(self, name: str) -> "Dataset":
        """Return the rows of a set that prepare wrote."""
        from datasets import Dataset, load_from_disk

        rows = load_from_disk(str(self.dataset(name)))
        assert isinstance(rows, Dataset)
        return rows

    def base_model(self) -> str:
        """Return the base that pretrain and SFT start from: model.path, else the tiny model."""
        return absolute(self.config.model.path or str(self.path / "pretrain" / "base"))

    def pretrained_model(self) -> str:
        """Return what SFT starts from: pretrain's result if that stage ran, else the base."""
        result = self.path / "pretrain" / "model"
        if self.summary("pretrain") is not None:
            return str(result)
        return self._given("model.path", self.config.model.path, "pretrain")

    def sft_model(self) -> str:
        """Return what PPO starts from: sft.path, else SFT's merged result, else the base."""
        if self.config.sft.path:
            return absolute(self.config.sft.path)
        if self.summary("sft") is not None:
            return str(self.path / "sft" / "model")
        return self._given("sft.path or model.path", self.config.model.path, "sft")

    def reward_model(self, *, to_be: bool = False) -> str | None:
        """Return reward.path, else the reward stage's result; None if no reward model is needed.

        Args:
            to_be: whether that stage need not have finished.
        """
        if not self.config.needs_reward_model:
            return None
        if self.config.reward.path:
            return absolute(self.config.reward.path)
        if to_be or self.summary("reward") is not None:
            return str(self.path / "reward" / "model")
        return self._given("reward.path", None, "reward")

    def critic_model(self, *, to_be: bool = False) -> str:
        """Return what the critic starts from: critic.path, else what critic.init names.

        Args:
            to_be: as of `reward_model`.
        """
        critic = self.config.critic
        if critic.path:
            return absolute(critic.path)
        reward_model = self.reward_model(to_be=to_be) if critic.init == "reward" else None
        return reward_model or self.sft_model()

    def _given(self, key: str, value: str | None, stage: str) -> str:
        if value is None:
            raise ConfigError(
                f"No model for this stage: the stage {stage} has not finished in {self.path}, "
                f"and {key} is not set. Run the stage {stage}, or set {key}"
            )
        return absolute(value)


def _new_file(folder: Path) -> os.stat_result | None:
    """Return owner and mode of a private file that this process makes; None if it may make none.

    Network storage may keep root's files as nobody's, containers map users, and where storage keeps
    no modes, every file and folder may be written by everybody.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return os.fstat(file.fileno())
    except OSError:
        return None


def require_durable_folder(config: Config) -> None:
    """Refuse a run folder inside the copy of the working folder, which Ray deletes.

    Raises:
        ConfigError: ``run.dir`` is relative.
    """
    if not Path(config.run.dir).is_absolute():
        raise ConfigError(
            f"run.dir {config.run.dir} is relative: on a cluster it would lie in a folder that Ray "
            "deletes after the job. Set it to an absolute path on durable storage, for example "
            f"run.dir=/mnt/shared/{config.run.dir}"
        )


def absolute(model: str) -> str:
    """Return a local folder by absolute path (roles run in other folders), a hub name as it is."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def located_function(spec: str) -> str:
    """Return ``file.py:name`` with an absolute path; a module or a built-in name as it is."""
    file, _, name = spec.rpartition(":")
    return f"{Path(file).absolute()}:{name}" if file.endswith(".py") else spec


def located(source: RewardSourceConfig) -> RewardSourceConfig:
    """Return a reward source with its model or file by absolute path."""
    if isinstance(source, FunctionSourceConfig):
        return source.model_copy(update={"function": located_function(source.function)})
    if isinstance(source, ModelSourceConfig | ClassifierSourceConfig) and source.path:
        return source.model_copy(update={"path": absolute(source.path)})
    return source
