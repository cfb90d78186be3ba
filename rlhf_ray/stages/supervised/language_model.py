"""What pretrain and SFT share: packed blocks, next-token loss, perplexity."""

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal

import torch
from datasets import Dataset, Features
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction, Trainer

from rlhf_ray.config import Config
from rlhf_ray.config.supervised import PretrainConfig, SftConfig
from rlhf_ray.data.reading.rows import StoredRows
from rlhf_ray.data.reading.tables import TOKEN_IDS, write_table
from rlhf_ray.data.rendering.packing import IGNORED, Block, concatenated, isolated, padded, unpacked
from rlhf_ray.errors import DataError
from rlhf_ray.runs.datasets import user_rows
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.step_log import TOKEN_LOSS
from rlhf_ray.stages.supervised.trainers import RowTrainer
from rlhf_ray.stages.supervised.training import (
    HELD_OUT,
    HELD_OUT_SHARE,
    TRAIN,
    Training,
    sizes,
)

_COLUMNS = {
    "concat": ("input_ids", "labels"),
    "isolate": ("input_ids", "labels", "position_ids"),
    "none": ("input_ids", "labels", "position_ids"),
}
"""Packing -> what a block gives to the model."""


class LanguageModelTrainer(RowTrainer):
    """A Trainer whose predictions are the summed loss of each row and its number of labels, `_B2`.

    Rows have unequal numbers of labels, so a mean of batch means would depend on how rows are
    dealt out to batches and processes.
    """

    def predict_rows(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        labels_BS = inputs.pop("labels")[:, 1:]
        logits_BVS = model(**inputs).logits[:, :-1].float().transpose(1, 2)
        losses_BS = cross_entropy(logits_BVS, labels_BS, ignore_index=IGNORED, reduction="none")
        sums_B2 = torch.stack([losses_BS.sum(1), (labels_BS != IGNORED).sum(1)], dim=1)
        return losses_BS.mean(), sums_B2


def token_loss(prediction: EvalPrediction) -> dict[str, float]:
    """Mean loss of all labels, nats a token, and its perplexity."""
    sums_B2: Any = prediction.predictions
    loss = float(sums_B2[:, 0].sum() / sums_B2[:, 1].sum())
    return {TOKEN_LOSS: loss, "perplexity": math.exp(loss)}


class LanguageModelTraining(Training):
    """Training on packed blocks of one length, or on single texts."""

    @property
    def settings(self) -> PretrainConfig | SftConfig:
        return getattr(self.config, self.name)

    def trainer(self, **parts: Any) -> Trainer:
        return LanguageModelTrainer(**parts)

    @property
    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        return token_loss

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The blocks' columns, `_BS`; the model shifts the labels itself.

        No attention mask: texts that do not see each other are told by their positions alone. Flash
        attention reads these in a single row only, so there a batch becomes one.
        """
        if self.settings.packing == "none":
            longest = max(len(row["input_ids"]) for row in rows)
            rows = [vars(padded(Block(**row), longest, self._pad_id)) for row in rows]
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        if "position_ids" in batch and "flash" in self.config.model.attn_implementation:
            return {name: tensor.view(1, -1) for name, tensor in batch.items()}
        return batch


def text_rows(config: Config, stage: Literal["pretrain", "sft"]) -> StoredRows:
    """The user's own rows, or the answers that prepare set aside for language modelling.

    Raises:
        DataError: the data cannot be read, or prepare has not run.
    """
    if getattr(config.data, stage) is not None:
        return user_rows(config, stage, stage)
    return StoredRows(RunFolder(config).rows("finetune"))


def packed_blocks(
    stage: str,
    documents: Dataset,
    settings: PretrainConfig | SftConfig,
    pad_id: int,
) -> dict[str, Dataset]:
    """Texts packed into blocks: the last share of the texts held out, the rest to train on.

    Args:
        stage: name, for the message.
        documents: from `load_documents`.
        settings: the stage's section: how to pack, tokens of a block, most held-out blocks.
        pad_id: fills blocks of whole texts.

    Returns:
        Columns ``input_ids`` and ``labels``, and ``position_ids`` where texts are isolated.

    Raises:
        DataError: there is not one whole block for either part.
    """
    size = settings.block_size
    num_train = len(documents) - max(1, round(len(documents) * HELD_OUT_SHARE))
    texts = {
        TRAIN: documents.select(range(num_train)),
        HELD_OUT: documents.select(range(num_train, len(documents))),
    }
    most = {TRAIN: None, HELD_OUT: settings.eval_rows}
    columns = _COLUMNS[settings.packing]
    features = Features(dict.fromkeys(columns, TOKEN_IDS))
    parts: dict[str, Dataset] = {}
    for part, rows in texts.items():
        blocks = islice(_blocks(rows, settings, pad_id), most[part])
        parts[part] = write_table(
            ({c: getattr(block, c) for c in columns} for block in blocks), features
        )
        if not len(parts[part]):
            raise DataError(
                f"{stage}: {len(documents)} texts fill no block of {size} tokens "
                f"({part.replace('_', '-')} part); add data or lower {stage}.block_size"
            )
    return parts


def _blocks(
    documents: Dataset, settings: PretrainConfig | SftConfig, pad_id: int
) -> Iterator[Block]:
    """The texts in blocks; a block of which nothing would be learnt is left out."""
    rows: Any = documents
    texts = ((row["token_ids"], row["learnt"]) for row in rows)
    if settings.packing == "concat":
        blocks = concatenated(texts, settings.block_size)
    elif settings.packing == "isolate":
        blocks = isolated(texts, settings.block_size, pad_id)
    else:
        blocks = unpacked(texts, settings.block_size)
    # The first label of a block is predicted by nothing.
    return (block for block in blocks if any(label != IGNORED for label in block.labels[1:]))


def language_model_numbers(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out loss (nats a token) and perplexity, exp(loss), before and after; steps and sizes."""
    held_out = {
        f"{name}_{when}": numbers[f"{when}_{name}"]
        for name in ("loss", "perplexity")
        for when in ("before", "after")
    }
    return held_out | sizes(numbers)
