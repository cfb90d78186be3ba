"""What the command plan says of models that are there as folders: sizes and trainings."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.algorithms.estimators import resolve
from rlhf_ray.config import Config
from rlhf_ray.config.model import LoraConfig
from rlhf_ray.models.memory import GB, training_bytes, weights_bytes
from rlhf_ray.models.sizes import Task, num_trainable, size_of, skeleton


@dataclass(frozen=True)
class PlannedModel:
    """One model folder that the config names."""

    key: str
    """Config key that names it first."""
    path: str
    parameters: int
    weights_bytes: float
    """In ``model.dtype``, not quantised."""


@dataclass(frozen=True)
class PlannedTraining:
    """What one process of a stage, or of a role of PPO, holds where nothing is sharded."""

    stage: str
    parameters: int
    trainable: int
    weights_bytes: float
    """Of what is frozen, as ``model.quantization`` has it."""
    training_bytes: int
    """Weights, gradients and Adam's moments of what is trained. Activations come on top."""


@dataclass(frozen=True)
class _Trained:
    stage: str
    path: str | None
    task: Task
    lora: LoraConfig | None
    unfreeze: list[str] | None = None


def planned_models(config: Config) -> list[PlannedModel]:
    """Each model folder of the config once."""
    found: dict[str, PlannedModel] = {}
    for section in ("model", "sft", "reward", "critic"):
        path = getattr(config, section).path
        if path not in found and _is_folder(path):
            task: Task = "SEQ_CLS" if section == "reward" else "CAUSAL_LM"
            size = size_of(skeleton(path, config.model, task))
            memory = weights_bytes(size, config.model.dtype)
            found[path] = PlannedModel(f"{section}.path", path, size.parameters, memory)
    return list(found.values())


def planned_trainings(config: Config) -> list[PlannedTraining]:
    """The stages of the run that train a model which is there as a folder."""
    return [_planned(config, part) for part in _parts(config) if _is_folder(part.path)]


def described(config: Config) -> list[str]:
    """Lines of two tables; none where no model is there as a folder."""
    lines: list[str] = []
    if models := planned_models(config):
        lines += ["", f"{'model':<14}{'parameters':>18}{'weights':>12}  folder"]
        lines += [
            f"{model.key:<14}{model.parameters:>18,}{_gb(model.weights_bytes):>12}  {model.path}"
            for model in models
        ]
    if trainings := planned_trainings(config):
        lines += ["", f"{'trains':<14}{'parameters':>18}{'frozen':>12}{'state':>12}  (a process)"]
        lines += [
            f"{part.stage:<14}{part.trainable:>18,}{_gb(part.weights_bytes):>12}"
            f"{_gb(part.training_bytes):>12}"
            for part in trainings
        ]
    return lines


def _parts(config: Config) -> Iterator[_Trained]:
    base, tuned = config.model.path, config.sft.path or config.model.path
    sft, reward, stages = config.sft, config.reward, config.run.stages
    if "pretrain" in stages:
        yield _Trained("pretrain", base, "CAUSAL_LM", None, config.pretrain.unfreeze)
    if "sft" in stages and sft.path is None:
        lora = sft.lora if sft.tuning == "lora" else None
        yield _Trained("sft", base, "CAUSAL_LM", lora, sft.unfreeze)
    if "reward" in stages and reward.path is None:
        lora = reward.lora if reward.tuning == "lora" else None
        yield _Trained("reward", tuned, "SEQ_CLS", lora, reward.unfreeze)
    if "dpo" in stages:
        yield _Trained("dpo", tuned, "CAUSAL_LM", config.dpo.lora)
    if "ppo" in stages:
        yield _Trained("ppo policy", tuned, "CAUSAL_LM", config.lora)
    if "ppo" in stages and resolve(config.ppo.advantage).needs_critic:
        start = config.reward.path if config.critic.init == "reward" else None
        critic = config.critic.path or start or tuned
        yield _Trained("ppo critic", critic, "SEQ_CLS", config.critic.lora)


def _planned(config: Config, part: _Trained) -> PlannedTraining:
    model = skeleton(str(part.path), config.model, part.task)
    size = size_of(model)
    trainable = num_trainable(model, part.task, part.lora, part.unfreeze)
    if part.lora is None:
        frozen = 4.0 * (size.parameters - trainable)  # all weights are in float32 there
    else:
        settings = config.model
        # Supervised stages compute in float32 what a quantised base keeps in half precision.
        widened = settings.quantization != "none" and not part.stage.startswith("ppo")
        dtype = "float32" if widened else settings.dtype
        frozen = weights_bytes(size, dtype, settings.quantization)
    memory = training_bytes(trainable)
    return PlannedTraining(part.stage, size.parameters, trainable, frozen, memory)


def _is_folder(path: Any) -> bool:
    return path is not None and (Path(path) / "config.json").is_file()


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:,.2f} GB"
