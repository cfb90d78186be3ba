"""Rotary embeddings for longer sequences: one value for learners, scorers and engines."""

from typing import Any

from transformers import AutoConfig

from rlhf_ray.config.model import ModelConfig
from rlhf_ray.errors import ConfigError


def rope_parameters(path: str, settings: ModelConfig) -> dict[str, Any] | None:
    """A model's rotary parameters with ``model.rope_scaling`` on top; None: as they are.

    A finished classifier keeps those that it was trained with: the scaling is of the base.

    Args:
        path: model folder or hub name.
        settings: ``rope_scaling`` and ``trust_remote_code``.

    Raises:
        ConfigError: the architecture has no rotary embedding, or one for each kind of layer.
    """
    if settings.rope_scaling is None:
        return None
    config = AutoConfig.from_pretrained(path, trust_remote_code=settings.trust_remote_code)
    if any("SequenceClassification" in name for name in config.architectures or ()):
        return None
    own = getattr(config, "rope_parameters", None)
    if not own or any(isinstance(value, dict) for value in own.values()):
        what = "one for each kind of layer" if own else "no rotary embedding"
        raise ConfigError(
            f"model.rope_scaling: {path} ({config.model_type}) has {what}; leave it out, or change "
            "the model folder's config.json"
        )
    return {**own, **settings.rope_scaling}
