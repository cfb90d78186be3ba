"""Numbers of parameters of a model that is there as a folder, without loading its weights."""

from collections.abc import Iterator
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
from rlhf_ray.models.parameters import parameter_groups
from rlhf_ray.planning.memory import ModelSize
from rlhf_ray.planning.model_shape import Linear, Shape, num_weights

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


def shape_of(model: Any) -> Shape:
    """What of a `skeleton` decides how much memory and time it takes."""
    config = model.config.get_text_config()
    heads, width = config.num_attention_heads, config.hidden_size
    alike: dict[tuple[str, int, int], int] = {}
    for name, inputs, outputs in _block_linears(model):
        alike[name, inputs, outputs] = alike.get((name, inputs, outputs), 0) + 1
    linears = tuple(Linear(*key, count) for key, count in alike.items())
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    own = [] if output is None or output.weight is embedding.weight else [output.weight]
    return Shape(
        num_layers=config.num_hidden_layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or width // heads,
        intermediate_size=_mlp_width(config),
        vocab_size=config.vocab_size,
        size=ModelSize(
            sum(group.parameters for group in parameter_groups(model)), num_weights(linears)
        ),
        output_parameters=sum(weight.numel() for weight in own),
        linears=linears,
    )


def _mlp_width(config: Any) -> int:
    names = ("intermediate_size", "ffn_dim", "n_inner")
    widths = (getattr(config, name, None) for name in names)
    return next((width for width in widths if width), 4 * config.hidden_size)


def _block_linears(model: Any) -> Iterator[tuple[str, int, int]]:
    """Last part of the name, inputs and outputs of each linear layer of the blocks."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in _OUTPUTS or not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        rows, columns = module.weight.shape
        yield (leaf, rows, columns) if isinstance(module, Conv1D) else (leaf, columns, rows)


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
