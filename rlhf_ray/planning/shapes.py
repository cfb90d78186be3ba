"""Which model each part of a run holds, from its folder or from the shape in the config."""

import functools
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from rlhf_ray.config import Config
from rlhf_ray.config.model import LoraConfig, ModelConfig, ShapeConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models.folders import base_of, is_adapter
from rlhf_ray.planning.model_shape import Shape, described, tiny_shape


@dataclass(frozen=True)
class PlannedModel:
    """One model that the config names."""

    key: str
    """Config key that names it."""
    path: str | None
    """None: the tiny Llama that is built, or a model that is still to be given."""
    folder: str | None
    """Of its config.json; None: its shape was described."""
    shape: Shape
    """As a causal LM."""
    assumed_for: str | None = None
    """``key=path`` of a model that is not there and is taken to have this one's shape."""

    def num_trained(self, lora: LoraConfig | None, is_scalar: bool, unfreeze: object = None) -> int:
        """Numbers that a training changes; a new scalar head is trained as well.

        Args:
            lora: the adapter; None: the model's own weights.
            is_scalar: whether it has a scalar head instead of its output layer.
            unfreeze: modules of its own that are trained alone; without a folder, which would say
                how large they are, all are taken.
        """
        if lora is not None:
            return self.shape.adapter_parameters(lora) + self.shape.hidden_size * is_scalar
        if unfreeze is None or self.folder is None:
            shape = self.shape.with_scalar_head() if is_scalar else self.shape
            return shape.size.parameters
        from rlhf_ray.planning.model_sizes import num_trainable, skeleton  # these load transformers

        task = "SEQ_CLS" if is_scalar else "CAUSAL_LM"
        model = skeleton(self.folder, ModelConfig(), task)
        return num_trainable(model, task, None, unfreeze)


@dataclass(frozen=True)
class Models:
    """The models of a run."""

    base: PlannedModel
    tuned: PlannedModel
    """What the policy is an adapter on."""
    reward: PlannedModel
    critic: PlannedModel

    @property
    def distinct(self) -> list[PlannedModel]:
        """Each once."""
        found = {model.key: model for model in (self.critic, self.reward, self.tuned, self.base)}
        return list(reversed(found.values()))

    @property
    def assumptions(self) -> list[str]:
        """What was taken for granted of models that are not there."""
        notes = [
            f"{model.assumed_for} is not here: taken to have the shape of {model.key}"
            for model in (self.tuned, self.reward, self.critic)
            if model.assumed_for
        ]
        return list(dict.fromkeys(notes))


def models_of(config: Config) -> Models:
    """Every model that the config names.

    Raises:
        DataError: model.path is neither here nor described, or its config.json cannot be read.
    """
    base = _base(config)
    tuned = _given(config, "sft.path", config.sft.path, None, base)
    reward = tuned
    if "reward" not in config.run.stages or config.reward.path is not None:
        reward = _given(config, "reward.path", config.reward.path, config.reward.shape, tuned)
    if config.critic.init == "reward":
        critic = reward
    else:
        critic = _given(config, "critic.path", config.critic.path, config.critic.shape, tuned)
    return Models(base, tuned, reward, critic)


def _base(config: Config) -> PlannedModel:
    model = config.model
    if model.path is None:
        shape = tiny_shape(model.tiny)
        return PlannedModel("model.tiny", None, None, shape)
    found = _model("model.path", model.path, model.shape, model.trust_remote_code)
    if found is None:
        raise DataError(
            f"model.path {model.path} is no model folder here, so its size is not known; name a "
            "folder with its config.json, or describe it for the plan: model.shape={num_layers: "
            "32, hidden_size: 4096, num_heads: 32, num_kv_heads: 8, intermediate_size: 14336, "
            "vocab_size: 128256}, with its own numbers"
        )
    return found


def _given(
    config: Config, key: str, path: str | None, shape: ShapeConfig | None, like: PlannedModel
) -> PlannedModel:
    """A model that may be given; none, or one that is neither here nor described: ``like``."""
    if path is None:
        return like if shape is None else PlannedModel(key, path, None, described(shape))
    found = _model(key, path, shape, config.model.trust_remote_code)
    assumed = PlannedModel(like.key, like.path, like.folder, like.shape, f"{key}={path}")
    return found or assumed


def _model(key: str, path: str, shape: ShapeConfig | None, remote: bool) -> PlannedModel | None:
    folder = _config_folder(path)
    if folder is not None:
        return PlannedModel(key, path, folder, _folder_shape(folder, remote))
    return None if shape is None else PlannedModel(key, path, None, described(shape))


def _config_folder(path: str) -> str | None:
    """Folder of a model's config.json: its own, its base's, or the hub's cache; None: not here."""
    if is_adapter(path):
        path = base_of(path)
    if (Path(path) / "config.json").is_file():
        return path
    is_name = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
    cached = try_to_load_from_cache(path, "config.json") if is_name else None
    return str(Path(cached).parent) if isinstance(cached, str) else None


@functools.cache
def _folder_shape(folder: str, remote: bool) -> Shape:
    from rlhf_ray.planning.model_sizes import shape_of, skeleton  # these load transformers

    return shape_of(skeleton(folder, ModelConfig(trust_remote_code=remote)))
