"""The shape of each model of a run: the numbers that its memory and time depend on.

They come from the model's folder or from a shape in the config; this module loads no torch.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from rlhf_ray.config import Config
from rlhf_ray.config.model import LoraConfig, ModelConfig, ShapeConfig, TinyModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models.folders import base_of, cached_file, is_adapter
from rlhf_ray.planning.memory import Linear, ModelSize, Shape, num_weights

_DESCRIBED = ("llama", "mistral", "olmo2", "qwen2", "qwen3")
"""Architectures of which `described_shape` knows all but norms and biases, by ``model_type``."""


def described_shape(shape: ShapeConfig) -> Shape:
    """Return a decoder like Llama, Mistral and Qwen: RMS norms, no biases, the same layer names."""
    heads, width, mlp = shape.num_heads, shape.hidden_size, shape.intermediate_size
    kv_heads = shape.num_kv_heads or heads
    head_dim = shape.head_dim or width // heads
    layers = shape.num_layers
    linears = (
        Linear("q_proj", width, heads * head_dim, layers),
        Linear("k_proj", width, kv_heads * head_dim, layers),
        Linear("v_proj", width, kv_heads * head_dim, layers),
        Linear("o_proj", heads * head_dim, width, layers),
        *([Linear("gate_proj", width, mlp, layers)] if shape.gated_mlp else []),
        Linear("up_proj", width, mlp, layers),
        Linear("down_proj", mlp, width, layers),
    )
    vocabulary = shape.vocab_size * width
    quantizable = num_weights(linears)
    output = 0 if shape.tied_embeddings else vocabulary
    norms = (2 * layers + 1) * width
    return Shape(
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        vocab_size=shape.vocab_size,
        size=ModelSize(quantizable + vocabulary + output + norms, quantizable),
        output_parameters=output,
        linears=linears,
    )


def tiny_shape(tiny: TinyModelConfig) -> Shape:
    """Return the shape of the small Llama that is built where no model is given."""
    return described_shape(ShapeConfig(**tiny.model_dump()))


@dataclass(frozen=True)
class PlannedModel:
    """One model that the config names."""

    key: str
    """Config key that names the model."""
    path: str | None
    """Folder or hub name; None for the tiny Llama, or a model that doesn't exist yet."""
    folder: str | None
    """Folder of its config.json; None where the config describes its shape."""
    shape: Shape
    """Its shape as a causal LM."""
    remote: bool = False
    """Whether code that comes with it may run."""
    assumed_for: str | None = None
    """``key=path`` of a model that isn't here and is assumed to have this shape."""

    def num_trained(
        self, lora: LoraConfig | None, is_scalar: bool, unfreeze: Sequence[str] | None = None
    ) -> int:
        """Return the number of parameters that a stage trains, a new scalar head included.

        Args:
            lora: the adapter; None: the model's own weights are trained.
            is_scalar: whether it has a scalar head instead of its output layer.
            unfreeze: names of the only modules that are trained; without a folder their sizes
                aren't known, and all weights are counted.
        """
        if lora is not None:
            return self.shape.adapter_parameters(lora) + self.shape.hidden_size * is_scalar
        if unfreeze is None or self.folder is None:
            shape = self.shape.with_scalar_head() if is_scalar else self.shape
            return shape.size.parameters
        from rlhf_ray.planning.model_sizes import num_trainable, skeleton  # loads transformers

        task = "SEQ_CLS" if is_scalar else "CAUSAL_LM"
        model = skeleton(self.folder, ModelConfig(trust_remote_code=self.remote), task)
        return num_trainable(model, task, None, unfreeze)


@dataclass(frozen=True)
class Models:
    """The models of a run."""

    base: PlannedModel
    tuned: PlannedModel
    """The SFT model, which the policy is an adapter on."""
    reward: PlannedModel
    critic: PlannedModel

    @property
    def distinct(self) -> list[PlannedModel]:
        """Each model once."""
        by_key = {model.key: model for model in (self.critic, self.reward, self.tuned, self.base)}
        return list(reversed(by_key.values()))

    @property
    def assumptions(self) -> list[str]:
        """Assumptions about models that aren't here."""
        notes = [
            f"{model.assumed_for} does not exist here; assumed to have the shape of {model.key}"
            for model in (self.tuned, self.reward, self.critic)
            if model.assumed_for
        ]
        return list(dict.fromkeys(notes))


def models_of(config: Config) -> Models:
    """Return every model that the config names.

    Raises:
        DataError: model.path is neither a folder here nor described by model.shape, or its
            config.json cannot be read.
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
            "folder with a config.json, or give its shape for the plan, such as "
            "model.shape={num_layers: 32, hidden_size: 4096, num_heads: 32, num_kv_heads: 8, "
            "intermediate_size: 14336, vocab_size: 128256}"
        )
    return found


def _given(
    config: Config, key: str, path: str | None, shape: ShapeConfig | None, like: PlannedModel
) -> PlannedModel:
    """Return an optional model, or ``like`` if it has no path, or is neither here nor described."""
    if path is None:
        return like if shape is None else PlannedModel(key, path, None, described_shape(shape))
    found = _model(key, path, shape, config.model.trust_remote_code)
    assumed = replace(like, assumed_for=f"{key}={path}")
    return found or assumed


def _model(key: str, path: str, shape: ShapeConfig | None, remote: bool) -> PlannedModel | None:
    folder = _config_folder(path)
    if folder is not None:
        return PlannedModel(key, path, folder, _folder_shape(folder, remote), remote)
    return None if shape is None else PlannedModel(key, path, None, described_shape(shape))


def _config_folder(path: str) -> str | None:
    """Return the folder of a model's config.json: its own, its base's or the hub cache's."""
    if is_adapter(path):
        path = base_of(path)
    if (Path(path) / "config.json").is_file():
        return path
    is_name = path.count("/") <= 1 and not path.startswith((".", "/", "~"))
    cached = cached_file(path, "config.json") if is_name else None
    return str(Path(cached).parent) if cached else None


@functools.cache
def _folder_shape(folder: str, remote: bool) -> Shape:
    if find_spec("transformers") is None:  # a client that only plans and submits
        shape = _common_shape(folder)
        if shape is not None:
            return described_shape(shape)
    from rlhf_ray.planning.model_sizes import shape_of, skeleton  # loads transformers

    return shape_of(skeleton(folder, ModelConfig(trust_remote_code=remote)))


def _common_shape(folder: str) -> ShapeConfig | None:
    """Return what a config.json says of a model of a common architecture; None: another one."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if config["model_type"] not in _DESCRIBED:
            return None
        return ShapeConfig(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads"),
            head_dim=config.get("head_dim"),
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            tied_embeddings=config.get("tie_word_embeddings", False),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder} has no config.json of a known architecture ({error}); name a model folder, "
            "or give its shape for the plan (model.shape)"
        ) from error
