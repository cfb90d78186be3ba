"""Check that the models, data and functions of a run exist, before its first stage starts."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rlhf_ray.algorithms.advantages import resolve
from rlhf_ray.algorithms.policy_losses import resolve_policy_loss
from rlhf_ray.config import Config
from rlhf_ray.config.data import DataSource
from rlhf_ray.config.rewards import ClassifierSourceConfig, FunctionSourceConfig, ModelSourceConfig
from rlhf_ray.config.stages import POLICIES, STAGES
from rlhf_ray.data.datasets.instructions import load_instructions
from rlhf_ray.data.reading.readers import read_rows
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.models.folders import locate
from rlhf_ray.plugins import load_function
from rlhf_ray.runs.folder import RunFolder, absolute, located_function


def require_inputs(config: Config, stages: Collection[str]) -> None:
    """Check every model, data set and function that the remaining stages read."""
    if any(STAGES[stage].needs_ray for stage in stages):
        for path in _models(config):
            locate(path)
    for use in dict.fromkeys(use for stage in stages for use in STAGES[stage].datasets):
        _require_rows(f"data.{use}", getattr(config.data, use) or ())
    if "reward" in stages:
        _require_rows("reward.benchmark", config.reward.benchmark or ())
    if "evaluate" in stages:
        _require_compared(config)
    if "ppo" in stages:
        _require_estimator(config)
        resolve_policy_loss(config.ppo.policy_loss)
        for source in config.rewards:
            if isinstance(source, FunctionSourceConfig):
                load_function(source.function, "rewards")


def _require_estimator(config: Config) -> None:
    """Check that the advantage function can be used, and has what keys are about."""
    ppo, estimator = config.ppo, resolve(config.ppo.advantage)
    try:
        if not estimator.needs_critic:
            ppo.refuse_keys_of_a_critic()
        if ppo.filter_groups.max_refills and not estimator.needs_groups:
            raise ppo.filter_groups.without_groups(ppo.advantage)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def files_of_roles(folder: RunFolder) -> list[str]:
    """Return the absolute paths of what roles read on their own nodes.

    These are local model folders, including those of the run's finished stages, and the files of
    the user's functions.
    """
    config = folder.config
    functions = [config.ppo.advantage, config.ppo.policy_loss]
    functions += [s.function for s in config.rewards if isinstance(s, FunctionSourceConfig)]
    files = [located_function(function).rpartition(":")[0] for function in functions]
    models = [absolute(path) for path in _models(config)]
    made = [folder.path / "pretrain" / "base", *folder.path.glob("*/model")]
    local = [model for model in (*models, *map(str, made)) if Path(model).is_dir()]
    return sorted({*local, *(file for file in files if file.endswith(".py"))})


def _require_rows(key: str, sources: Sequence[DataSource]) -> None:
    for source in sources:
        if next(read_rows(source), None) is None:
            raise DataError(f"{key}: {source.label} holds no rows")


def _require_compared(config: Config) -> None:
    """Check the models to compare and the user's instructions."""
    for name in config.evaluate.models or ():
        is_of_run = name in POLICIES or name.startswith("ppo@")
        if not is_of_run and not Path(name).is_dir():
            raise DataError(
                f"evaluate.models: {name} is not a model of the run and not a folder; give "
                f"{', '.join(POLICIES)}, a commit such as ppo@12 or ppo@best, or a folder"
            )
    if config.evaluate.instructions is not None:
        load_instructions(config.evaluate.instructions)


def _models(config: Config) -> Iterator[str]:
    paths = [config.model.path, config.sft.path, config.reward.path, config.critic.path]
    for source in config.rewards:
        if isinstance(source, ModelSourceConfig | ClassifierSourceConfig):
            paths.append(source.path)
    yield from filter(None, paths)
