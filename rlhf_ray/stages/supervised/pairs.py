"""The base of reward and dpo: pairs of answers of which people preferred one."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_ray.config import Config
from rlhf_ray.config.supervised import PairsConfig
from rlhf_ray.data.datasets.drawn_rows import LARGE, DrawnRows
from rlhf_ray.data.datasets.preferences import load_pairs
from rlhf_ray.data.reading.counts import SkippedRows
from rlhf_ray.data.reading.draws import (
    prompt_group,
    share_of_sample,
    share_of_stored,
    split_groups,
    try_sample,
)
from rlhf_ray.data.reading.rows import Row, StoredRows, unpack_row
from rlhf_ray.data.reading.tables import TokenRow
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError
from rlhf_ray.models import loading
from rlhf_ray.models.token_logprobs import position_ids
from rlhf_ray.runs.datasets import preference_sources, prepared_rows, user_rows
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.ai_labels import ai_labelled_rows
from rlhf_ray.stages.supervised.launcher import tokenised
from rlhf_ray.stages.supervised.training import (
    HELD_OUT,
    HELD_OUT_LOSS,
    HELD_OUT_SHARE,
    TRAIN,
    Counts,
    Training,
)

CHOSEN, REJECTED = 0, 1
"""Indices in the pair dimension, P, of every batch."""


class PairTraining(Training):
    """Training on pairs of token lists that share their first ``num_prompt_tokens``."""

    @property
    def settings(self) -> PairsConfig:
        return getattr(self.config, self.name)

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Pad pairs on the right to the longest text of the batch.

        Returns:
            ``input_ids``, ``attention_mask`` and ``position_ids``, each `_BPS`; ``prompt_lengths``,
            `_B`.
        """
        sides = [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")]
        flat = padded_texts(sides, self.pad_id)
        texts = {name: tensor_NS.view(len(rows), 2, -1) for name, tensor_NS in flat.items()}
        prompts_B = torch.tensor([row["num_prompt_tokens"] for row in rows])
        return texts | {"prompt_lengths": prompts_B}

    def measure(self, rows: np.ndarray) -> dict[str, float]:
        """Compute the loss, and the share of pairs whose chosen answer scores higher.

        A tie counts as wrong.
        """
        accuracy = float((rows[:, CHOSEN] > rows[:, REJECTED]).mean())
        loss = float(self.mean_loss(torch.from_numpy(rows)))
        return {HELD_OUT_LOSS: loss, "accuracy": accuracy}

    @abstractmethod
    def mean_loss(self, scores_BP: Tensor) -> Tensor:
        """Return the mean loss of pairs, given the numbers of each that `predict_rows` returns."""


def padded_texts(token_lists: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Pad texts on the right to the longest of them.

    Returns:
        ``input_ids``, ``attention_mask`` and ``position_ids``, each `_NS`.
    """
    input_ids_NS = pad_sequence([torch.tensor(ids) for ids in token_lists], True, pad_id)
    lengths_N1 = torch.tensor([[len(ids)] for ids in token_lists])
    attention_NS = (torch.arange(input_ids_NS.shape[1]) < lengths_N1).long()
    return {
        "input_ids": input_ids_NS,
        "attention_mask": attention_NS,
        "position_ids": position_ids(attention_NS),
    }


def load_training_pairs(
    training: PairTraining,
) -> tuple[Mapping[str, Dataset], Mapping[str, Counts]]:
    """Load tokenised pairs to train on and held out, and the counts of the rows read for each.

    Raises:
        DataError: no rows, or too many that cannot be used.
    """
    rows, what = _pair_rows(training), f"{training.name}'s pairs"
    return load_stage_parts(training, rows, load_pairs, what)


def load_stage_parts(
    training: Training,
    parts: Mapping[str, StoredRows],
    load: Callable[..., tuple[Dataset, Counts]],
    what: str,
) -> tuple[Mapping[str, Dataset], Mapping[str, Counts]]:
    """Tokenise a stage's parts as `load_parts`, or take those that it stored before."""
    config = training.config
    return tokenised(
        training,
        parts[TRAIN].digest,
        lambda: load_parts(parts, load, config, training.base, what),
    )


def load_parts(
    parts: Mapping[str, Iterable[Row | SkippedRows]],
    load: Callable[..., tuple[Dataset, Counts]],
    config: Config,
    tokenizer: str,
    what: str,
) -> tuple[dict[str, Dataset], dict[str, Counts]]:
    """Tokenise each part of the rows; return its data set and the counts of its rows.

    Raises:
        DataError: a part without rows, or with too many that cannot be used.
    """
    renderer = Renderer(loading.load_tokenizer(tokenizer, config.model), config.template)
    data: dict[str, Dataset] = {}
    counts: dict[str, Counts] = {}
    load = partial(
        load,
        renderer=renderer,
        max_length=config.model.max_length,
        overlong=config.data.overlong,
    )
    share = config.data.max_bad_share
    for part, rows in parts.items():
        name = f"{what} ({part.replace(HELD_OUT, 'held-out')})"
        try_sample(rows, load, share, name)
        given, allowed = rows, share
        if isinstance(rows, StoredRows) and rows.num_unread:
            # The reader's skipped rows are of the whole set, these are a part.
            given = StoredRows(rows.table)
            allowed = share_of_sample(share_of_stored(rows, share), len(rows.table))
        elif part == HELD_OUT and isinstance(rows, StoredRows):  # few of the rows, drawn
            allowed = share_of_sample(share, len(rows.table))
        data[part], counts[part] = load(given, max_bad_share=allowed, name=name)
        if isinstance(rows, StoredRows) and rows.num_unread:
            counts[part] |= {each.reason: each.num for each in rows.skipped}
            counts[part]["unread"] = rows.num_unread
    return data, counts


def _pair_rows(training: PairTraining) -> dict[str, StoredRows]:
    """Return rows to train on and held out: the user's, or else prepare's two sets."""
    config, settings = training.config, training.settings
    seed = config.run.seed
    sources = preference_sources(config)
    if sources is None:
        run_folder = RunFolder(config)
        train, held_out = (prepared_rows(run_folder, name) for name in ("reward", "evaluation"))
        both = replace(train, digest=train.digest + held_out.digest)
        return _limited(both, held_out.table, settings, seed)
    if settings.judge is not None:
        loaded = ai_labelled_rows(config, training.name, settings.judge)
    else:
        data = config.data.model_copy(update={"preferences": sources})
        mixed = config.model_copy(update={"data": data})
        loaded = user_rows(mixed, "preferences", "preferences")
    return split_rows(loaded, settings, seed, training.began_whole)


def split_rows(
    loaded: StoredRows, settings: PairsConfig, seed: int, is_whole: bool = False
) -> dict[str, StoredRows]:
    """Split the user's rows: a sample is held out, the others are to train on.

    Of a large set with ``max_pairs``, rows are drawn first and the others are not looked at, unless
    ``is_whole``.

    Raises:
        DataError: one row is usable, which cannot be both.
    """
    rows = loaded.table
    if len(rows) > LARGE and settings.max_pairs is not None and not is_whole:
        return _drawn_parts(loaded, settings.max_pairs, settings.eval_rows, seed)
    if len(rows) == 1:
        raise DataError(
            "data.preferences holds 1 usable row; at least 2 are needed, as one is held out. Add "
            "rows"
        )
    num_held_out = min(settings.eval_rows, max(1, round(len(rows) * HELD_OUT_SHARE)))
    stored: Any = rows  # datasets types a row as a dict or a list
    groups = [prompt_group(unpack_row(row)) for row in stored]
    train, held_out = split_groups(groups, num_held_out, seed)
    train_rows = replace(loaded, table=rows.select(train))
    return _limited(train_rows, rows.select(held_out), settings, seed)


def _drawn_parts(
    loaded: StoredRows, num_train: int, num_held_out: int, seed: int
) -> dict[str, StoredRows]:
    drawn, rows = DrawnRows(loaded, seed, 1.0, "pairs"), loaded.table
    train, held_out = (
        [number for number, _ in islice(chain.from_iterable(drawn.part(is_held_out)), num)]
        for is_held_out, num in ((False, num_train), (True, num_held_out))
    )
    num_unread = len(rows) - len(train) - len(held_out)
    return {
        TRAIN: replace(loaded, table=rows.select(train), num_unread=num_unread),
        HELD_OUT: StoredRows(rows.select(held_out)),
    }


def _limited(
    train_rows: StoredRows, held_out: Dataset, settings: PairsConfig, seed: int
) -> dict[str, StoredRows]:
    """Cut both parts to the numbers of rows that the config allows."""
    chosen, skipped = _at_most(train_rows.table, settings.max_pairs, seed), list(train_rows.skipped)
    num_left_out = len(train_rows.table) - len(chosen)
    if num_left_out:
        # They still count as good rows: max_bad_share is a share of the whole set.
        skipped.append(SkippedRows("over_max_pairs", is_bad=False, num=num_left_out))
    return {
        TRAIN: StoredRows(chosen, skipped, train_rows.digest),
        HELD_OUT: StoredRows(_at_most(held_out, settings.eval_rows, seed)),
    }


def _at_most(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """Choose rows at random, because neighbours share a question."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=seed, keep_in_memory=True).select(range(limit))
