"""What a run reads from outside is looked for before its first stage, not hours later."""

from collections.abc import Collection, Iterator

from rlhf_ray.config import Config
from rlhf_ray.config.rewards import ClassifierSourceConfig, ModelSourceConfig
from rlhf_ray.data.readers import read
from rlhf_ray.errors import DataError
from rlhf_ray.models.folders import locate

TRAINED_OR_SAMPLED = {"pretrain", "sft", "reward", "dpo", "ppo", "evaluate"}
READERS = {
    "pretrain": {"pretrain"},
    "sft": {"sft"},
    "preferences": {"reward", "dpo"},
    "prompts": {"ppo", "evaluate"},
    "eval": {"ppo", "evaluate"},
}
"""Use of a data set -> stages that read it."""


def require_inputs(config: Config, stages: Collection[str]) -> None:
    """Find every model and data set that the stages to come are given.

    Raises:
        DataError: one is not there, or the first row of a data set cannot be read.
    """
    if TRAINED_OR_SAMPLED & set(stages):
        for path in _models(config):
            locate(path)
    for use, readers in READERS.items():
        if readers & set(stages):
            for source in getattr(config.data, use) or ():
                if next(read(source), None) is None:
                    raise DataError(f"data.{use}: {source.path} holds no rows")


def _models(config: Config) -> Iterator[str]:
    paths = [config.model.path, config.sft.path, config.reward.path, config.critic.path]
    for source in config.rewards:
        if isinstance(source, ModelSourceConfig | ClassifierSourceConfig):
            paths.append(source.path)
    yield from filter(None, paths)
