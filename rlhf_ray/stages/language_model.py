"""What pretrain and SFT share: packed blocks, next-token loss, perplexity."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from datasets import Dataset

from rlhf_ray.config import Config
from rlhf_ray.config.supervised import PretrainConfig, SftConfig
from rlhf_ray.data.packing import pack
from rlhf_ray.data.sources import load_rows
from rlhf_ray.errors import DataError
from rlhf_ray.stages.run_folder import RunFolder
from rlhf_ray.stages.training import HELD_OUT, HELD_OUT_SHARE, TRAIN, Training


class LanguageModelTraining(Training):
    """Training on blocks of one length, every token a label."""

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """``input_ids`` and equal ``labels``, `_BS`; the model shifts them itself."""
        input_ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": input_ids, "labels": input_ids.clone()}


def text_rows(config: Config, stage: Literal["pretrain", "sft"]) -> Dataset:
    """The user's own rows, or the answers that prepare set aside for language modelling.

    Raises:
        DataError: the data cannot be read, or prepare has not run.
    """
    sources = getattr(config.data, stage)
    if sources is not None:
        return load_rows(sources, stage, config.prepare.max_pairs, config.run.seed)
    return RunFolder(config).rows("finetune")


def packed_blocks(
    stage: str,
    documents: Dataset,
    settings: PretrainConfig | SftConfig,
) -> dict[str, Dataset]:
    """Texts packed into blocks: the last share of the texts held out, the rest to train on.

    Args:
        stage: name, for the message.
        documents: from `load_documents`.
        settings: the stage's section: tokens of a block, most held-out blocks.

    Raises:
        DataError: there is not one whole block for either part.
    """
    size = settings.block_size
    token_lists = documents["token_ids"][:]
    num_held_out = max(1, round(len(token_lists) * HELD_OUT_SHARE))
    parts = {
        TRAIN: pack(token_lists[:-num_held_out], size),
        HELD_OUT: pack(token_lists[-num_held_out:], size)[: settings.eval_rows],
    }
    for part, blocks in parts.items():
        if not blocks:
            raise DataError(
                f"{stage}: {len(token_lists)} texts fill no block of {size} tokens "
                f"({part.replace('_', '-')} part); add data or lower {stage}.block_size"
            )
    return {part: Dataset.from_dict({"input_ids": blocks}) for part, blocks in parts.items()}


def language_model_numbers(numbers: Mapping[str, float]) -> dict[str, float]:
    """Held-out loss (nats a token) and perplexity, exp(loss), before and after."""
    before, after = numbers["before_loss"], numbers["after_loss"]
    return {
        "loss_before": before,
        "loss_after": after,
        "perplexity_before": math.exp(before),
        "perplexity_after": math.exp(after),
    }
