"""Numbers of parameters of a model that is there as a folder, without loading its weights."""

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import adapters
from rlhf_ray.models.folders import first_line
from rlhf_ray.models.freezing import train_only
from rlhf_ray.models.memory import ModelSize
from rlhf_ray.models.parameters import parameter_groups

Task = Literal["CAUSAL_LM", "SEQ_CLS"]

_OUTPUTS = ("lm_head", "score", "classifier")


def skeleton(folder: str | Path, settings: ModelConfig, task: Task = "CAUSAL_LM") -> Any:
    """The model of a folder's config.json without any weights, in no memory.

    Raises:
        DataError: config.json cannot be read, or is of an architecture that is not known.
    """
    remote = settings.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
        with torch.device("meta"):
            if task == "CAUSAL_LM":
                return AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
            config.num_labels = 1
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=remote)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} has no config.json of a known model ({first_line(error)}); name a model "
            "folder, or set model.trust_remote_code for one that brings its own code"
        ) from error


def size_of(model: Any) -> ModelSize:
    """Its parameters, and those that a quantised base holds in few bits."""
    linear = [
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and name.rpartition(".")[2] not in _OUTPUTS
    ]
    return ModelSize(sum(group.parameters for group in parameter_groups(model)), sum(linear))


def num_trainable(model: Any, task: Task, lora: LoraConfig | None, unfreeze: Any = None) -> int:
    """Parameters that a stage trains.

    Args:
        model: a `skeleton`; it is changed.
        task: as it was made for; a new head is trained as well.
        lora: the adapter; None: the model's own weights.
        unfreeze: modules of these that are trained alone.

    Raises:
        ConfigError: the model has no such modules.
    """
    if lora is not None:
        with torch.device("meta"):
            model = adapters.attach(model, lora, task, seed=0, dropout=0.0)
    elif unfreeze is not None:
        train_only(model, [*unfreeze, *(["score"] if task == "SEQ_CLS" else [])], "unfreeze")
    return sum(group.trainable for group in parameter_groups(model))
