"""The base of pretrain and SFT: packed blocks, next-token loss, perplexity."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, Features
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from rlhf_ray.cluster.nodes import map_in_order, num_cores
from rlhf_ray.config import Config
from rlhf_ray.config.supervised import PretrainConfig, SftConfig
from rlhf_ray.data.datasets.drawn_rows import LARGE
from rlhf_ray.data.datasets.drawn_texts import BlockMap, DrawnTexts, one_by_one
from rlhf_ray.data.datasets.texts import TextRendering, load_documents
from rlhf_ray.data.reading.draws import split_groups, try_sample
from rlhf_ray.data.reading.rows import StoredRows
from rlhf_ray.data.reading.tables import TOKEN_IDS, TokenRow, write_table
from rlhf_ray.data.rendering.packing import IGNORED, Block, concatenated, isolated, unpacked
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError
from rlhf_ray.models.isolation import isolate_texts
from rlhf_ray.models.tokenizers import load_tokenizer
from rlhf_ray.runs.datasets import prepared_rows, user_rows
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.launcher import run_training, tokenised
from rlhf_ray.stages.supervised.pairs import padded_texts
from rlhf_ray.stages.supervised.trainer import Trained
from rlhf_ray.stages.supervised.training import (
    HELD_OUT,
    HELD_OUT_LOSS,
    HELD_OUT_SHARE,
    TRAIN,
    Counts,
    Training,
)

_COLUMNS = {
    "concat": ("input_ids", "labels"),
    "isolate": ("input_ids", "labels", "position_ids"),
    "none": ("input_ids", "labels"),
}
"""Packing -> columns of a block."""

MANY_CORES = 4
"""Cores from which texts are tokenised in Ray's processes, each of which imports for seconds."""


class LanguageModelTraining(Training):
    """Training on packed blocks of one length, or on single texts."""

    model_computes_loss = True

    @property
    def settings(self) -> PretrainConfig | SftConfig:
        return getattr(self.config, self.name)

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """The blocks' columns, `_BS`; the model shifts the labels itself.

        Single texts have an attention mask. Blocks have none: their positions keep the texts apart,
        or a mask that `ready` adds. Flash attention reads positions in a single row only, so there
        a batch of blocks becomes one row.
        """
        if self.settings.packing == "none":
            labels = [torch.tensor(row["labels"]) for row in rows]
            texts = padded_texts([row["input_ids"] for row in rows], self.pad_id)
            return texts | {"labels": pad_sequence(labels, True, IGNORED)}
        batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
        if "position_ids" in batch and "flash" in self.config.model.attn_implementation:
            return {name: tensor.view(1, -1) for name, tensor in batch.items()}
        return batch

    def ready(self, model: nn.Module) -> None:
        if self.settings.packing == "isolate":
            isolate_texts(model, self.settings.block_size, f"{self.name}.packing")

    def predict_rows(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss, and the summed loss of each row with its number of labels, `_B2`.

        Rows have unequal numbers of labels, so the mean over labels needs both.
        """
        labels_BS = inputs.pop("labels")[:, 1:]
        logits_BVS = model(**inputs).logits[:, :-1].float().transpose(1, 2)
        losses_BS = cross_entropy(logits_BVS, labels_BS, ignore_index=IGNORED, reduction="none")
        sums_B2 = torch.stack([losses_BS.sum(1), (labels_BS != IGNORED).sum(1)], dim=1)
        return losses_BS.mean(), sums_B2

    def measure(self, rows: np.ndarray) -> dict[str, float]:
        """Compute the mean loss of all labels, nats a token, and its perplexity."""
        loss = float(rows[:, 0].sum() / rows[:, 1].sum())
        return {HELD_OUT_LOSS: loss, "perplexity": math.exp(loss)}


def text_rows(config: Config, stage: Literal["pretrain", "sft"]) -> StoredRows:
    """Return the user's rows, or the answers that prepare keeps for language modelling.

    Raises:
        DataError: the data cannot be read, or prepare has not run.
    """
    if getattr(config.data, stage) is not None:
        return user_rows(config, stage, stage)
    return prepared_rows(RunFolder(config), "finetune")


def packed_blocks(
    stage: str,
    documents: Dataset,
    settings: PretrainConfig | SftConfig,
    pad_id: int,
    num_held_out: int | None = None,
) -> dict[str, Dataset]:
    """Pack texts into blocks; the last texts are held out.

    Returns:
        Columns ``input_ids`` and ``labels``, and ``position_ids`` where texts are isolated.

    Raises:
        DataError: there is not one whole block for either part.
    """
    if len(documents) < 2:
        raise DataError(
            f"{stage}: {len(documents)} text can be used; at least 2 are needed, as one is held "
            "out. Add data"
        )
    num_train = len(documents) - (num_held_out or _num_held_out(documents))
    texts: dict[str, Any] = {  # datasets types a row as a dict or a list
        TRAIN: documents.select(range(num_train)),
        HELD_OUT: documents.select(range(num_train, len(documents))),
    }
    max_blocks = {TRAIN: None, HELD_OUT: settings.eval_rows}
    return {
        part: _write_blocks(stage, part, rows, settings, pad_id, max_blocks[part])
        for part, rows in texts.items()
    }


def _write_blocks(
    stage: str,
    part: str,
    documents: Iterable[TokenRow],
    settings: PretrainConfig | SftConfig,
    pad_id: int,
    max_blocks: int | None,
) -> Dataset:
    """Pack texts into at most ``max_blocks`` blocks; texts that these do not need are not taken.

    Raises:
        DataError: there is not one whole block.
    """
    columns = _COLUMNS[settings.packing]
    features = Features(dict.fromkeys(columns, TOKEN_IDS))
    num_texts = 0

    def counted() -> Iterator[TokenRow]:
        nonlocal num_texts
        for document in documents:
            num_texts += 1
            yield document

    blocks = islice(_blocks(counted(), settings, pad_id), max_blocks)
    table = write_table(({c: getattr(block, c) for c in columns} for block in blocks), features)
    if not len(table):
        raise DataError(
            f"{stage}: {num_texts} texts fill no block of {settings.block_size} tokens "
            f"({part.replace('_', '-')} part); add data or lower {stage}.block_size"
        )
    return table


def _num_held_out(documents: Dataset) -> int:
    return max(1, round(len(documents) * HELD_OUT_SHARE))


def _blocks(
    documents: Iterable[TokenRow], settings: PretrainConfig | SftConfig, pad_id: int
) -> Iterator[Block]:
    """Pack the texts, and leave out blocks from which nothing would be learnt."""
    texts = ((row["token_ids"], row["learnt"]) for row in documents)
    if settings.packing == "concat":
        blocks = concatenated(texts, settings.block_size)
    elif settings.packing == "isolate":
        blocks = isolated(texts, settings.block_size, pad_id)
    else:
        blocks = unpacked(texts, settings.block_size)
    # The first label of a block is predicted by nothing.
    return (block for block in blocks if any(label != IGNORED for label in block.labels[1:]))


def train_on_texts(
    training: LanguageModelTraining,
    rows: StoredRows,
    rendering: Callable[[Renderer], TextRendering] = TextRendering,
) -> tuple[Trained, dict[str, object]]:
    """Tokenise and pack the rows and train on them; returns also the summary, but for the seconds.

    The summary has the held-out loss (nats a token) and perplexity, exp(loss), before and after.
    """

    is_drawn = len(rows.table) > LARGE and not training.began_whole

    def build() -> tuple[dict[str, Dataset], Counts]:
        config = training.config
        renderer = Renderer(load_tokenizer(training.base, config.model), config.template)
        return _build_blocks(training, rows, rendering(renderer), is_drawn)

    blocks, counts = tokenised(training, rows.digest, build)
    trained = run_training(training, len(blocks[TRAIN]))
    held_out = {
        f"{key}_{when}": numbers[key]
        for key in ("loss", "perplexity")
        for when, numbers in (("before", trained.before), ("after", trained.after))
    }
    return trained, held_out | trained.sizes() | {"rows": counts}


def _build_blocks(
    training: LanguageModelTraining, rows: StoredRows, rendering: TextRendering, is_drawn: bool
) -> tuple[dict[str, Dataset], Counts]:
    """Return a set's blocks and counts; of drawn texts only as many as the training needs."""
    config, settings = training.config, training.settings
    name, share, seed = f"{training.name}'s texts", config.data.max_bad_share, config.run.seed
    load = partial(load_documents, **vars(rendering))
    try_sample(rows, load, share, name)
    if is_drawn:
        map_blocks: BlockMap = one_by_one
        if config.cluster.runs_on_ray and num_cores() >= MANY_CORES:
            map_blocks = partial(map_in_order, timeout_s=config.cluster.call_timeout_s)
        drawn = DrawnTexts(rows, rendering, seed, share, name, map_blocks)
        pad_id = training.pad_id
        num_needed = None if settings.epochs else settings.steps * settings.batch_size
        parts = {
            part: _write_blocks(
                training.name, part, drawn.documents(part == HELD_OUT), settings, pad_id, num
            )
            for part, num in ((TRAIN, num_needed), (HELD_OUT, settings.eval_rows))
        }
        return parts, drawn.counts
    documents, counts = load(rows, max_bad_share=share, name=name)
    train, held_out = split_groups(documents["group"][:], _num_held_out(documents), seed)
    ordered = documents.select([*train, *held_out])
    blocks = packed_blocks(training.name, ordered, settings, training.pad_id, len(held_out))
    return blocks, counts
