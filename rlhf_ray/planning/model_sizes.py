"""Parameter counts of a model folder, without loading its weights; loads transformers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from rlhf_ray.config.model import LoraConfig, ModelConfig
from rlhf_ray.errors import DataError
from rlhf_ray.models import adapters
from rlhf_ray.models.folders import first_line, refuse_endless
from rlhf_ray.models.trainable import parameter_groups, train_only
from rlhf_ray.planning.memory import Linear, ModelSize, Shape, num_weights

Task = Literal["CAUSAL_LM", "SEQ_CLS"]

_OUTPUTS = ("lm_head", "score", "classifier")


def skeleton(
    folder: str | Path, settings: ModelConfig, task: Task = "CAUSAL_LM"
) -> PreTrainedModel:
    """Return the model of a folder's config.json on the meta device, which takes no memory.

    Raises:
        DataError: config.json cannot be read, or its architecture is unknown.
    """
    remote = settings.trust_remote_code
    refuse_endless(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=remote)
        with torch.device("meta"):
            if task == "CAUSAL_LM":
                return AutoModelForCausalLM.from_config(config, trust_remote_code=remote)
            config.num_labels = 1
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=remote)
    except Exception as error:  # of whatever kind: libraries use the file's values unchecked
        raise DataError(
            f"{folder} has no config.json of a known architecture ({first_line(error)}); name a "
            "model folder, or set model.trust_remote_code=true if it comes with its own code"
        ) from error


def shape_of(model: PreTrainedModel) -> Shape:
    """Return the shape of a `skeleton`."""
    config = model.config.get_text_config()
    heads, width = config.num_attention_heads, config.hidden_size
    counts: dict[tuple[str, int, int], int] = {}
    for name, inputs, outputs in _block_linears(model):
        counts[name, inputs, outputs] = counts.get((name, inputs, outputs), 0) + 1
    linears = tuple(Linear(*key, count) for key, count in counts.items())
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


def _mlp_width(config: PretrainedConfig) -> int:
    names = ("intermediate_size", "ffn_dim", "n_inner")
    widths = (getattr(config, name, None) for name in names)
    return next((width for width in widths if width), 4 * config.hidden_size)


def _block_linears(model: PreTrainedModel) -> Iterator[tuple[str, int, int]]:
    """Yield the last part of the name, inputs and outputs of each linear layer in the blocks."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in _OUTPUTS or not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        rows, columns = module.weight.shape
        yield (leaf, rows, columns) if isinstance(module, Conv1D) else (leaf, columns, rows)


def num_trainable(
    model: PreTrainedModel,
    task: Task,
    lora: LoraConfig | None,
    unfreeze: Sequence[str] | None = None,
) -> int:
    """Return the number of parameters of a `skeleton`, which it modifies, that a stage trains.

    Raises:
        ConfigError: the model has no such modules.
    """
    trained: torch.nn.Module = model
    if lora is not None:
        with torch.device("meta"):
            trained = adapters.attach(model, lora, task, seed=0, dropout=0.0)
    elif unfreeze is not None:
        train_only(model, [*unfreeze, *(["score"] if task == "SEQ_CLS" else [])], "unfreeze")
    return sum(group.trainable for group in parameter_groups(trained))
