"""What reward and dpo share: pairs of answers of which people preferred one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction

from rlhf_ray.config.supervised import PairsConfig
from rlhf_ray.data.datasets.preferences import load_pairs
from rlhf_ray.data.reading.rows import StoredRows
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.models import loading
from rlhf_ray.models.heads import position_ids
from rlhf_ray.runs.datasets import user_rows
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.ai_labels import judged_rows
from rlhf_ray.stages.supervised.training import HELD_OUT, HELD_OUT_SHARE, TRAIN, Training

CHOSEN, REJECTED = 0, 1
"""Places in the pair dimension, P, of every batch."""


class PairTraining(Training):
    """Training on pairs of token lists that share their first ``num_prompt_tokens``."""

    @property
    def settings(self) -> PairsConfig:
        return getattr(self.config, self.name)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pairs padded on the right to the longest text of the batch.

        Returns:
            ``input_ids``, ``attention_mask`` and ``position_ids``, each `_BPS`; ``prompt_lengths``,
            `_B`.
        """
        sides = [row[side] for row in rows for side in ("chosen_ids", "rejected_ids")]
        flat = padded_texts(sides, self._pad_id)
        texts = {name: tensor_NS.view(len(rows), 2, -1) for name, tensor_NS in flat.items()}
        prompts_B = torch.tensor([row["num_prompt_tokens"] for row in rows])
        return texts | {"prompt_lengths": prompts_B}

    @property
    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        return pair_accuracy


def padded_texts(token_lists: Sequence[Sequence[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """Texts padded on the right to the longest of them.

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


def pair_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the pairs whose chosen answer scores higher; a tie counts as wrong."""
    scores_BP: Any = prediction.predictions
    return {"accuracy": float((scores_BP[:, CHOSEN] > scores_BP[:, REJECTED]).mean())}


def load_training_pairs(
    training: PairTraining,
) -> tuple[dict[str, Dataset], dict[str, dict[str, int]]]:
    """Tokenised pairs to train on and held out, and the counts of the rows read for each.

    Raises:
        DataError: no rows, or too many that cannot be used.
    """
    config = training.config
    renderer = Renderer(loading.load_tokenizer(training.base), config.template)
    pairs: dict[str, Dataset] = {}
    counts: dict[str, dict[str, int]] = {}
    for part, rows in _pair_rows(training).items():
        pairs[part], counts[part] = load_pairs(
            rows,
            renderer,
            config.model.max_length,
            config.data.overlong,
            config.data.max_bad_share,
            f"{training.name}'s pairs ({part.replace('_', '-')})",
        )
    return pairs, counts


def _pair_rows(training: PairTraining) -> dict[str, StoredRows]:
    """Rows to train on and held out: the user's own, the last of them held out, or prepare's."""
    config, settings = training.config, training.settings
    seed = config.run.seed
    if config.data.preferences is None:
        run_folder = RunFolder(config)
        train_rows, held_out = run_folder.rows("reward"), run_folder.rows("evaluation")
        return _limited(StoredRows(train_rows), held_out, settings, seed)
    if settings.judge is not None:
        loaded = judged_rows(config, training.name, settings.judge)
    else:
        loaded = user_rows(config, "preferences", "preferences")
    return parts_of(loaded, settings, seed)


def parts_of(loaded: StoredRows, settings: PairsConfig, seed: int) -> dict[str, StoredRows]:
    """The user's own rows to train on, and the last of them held out."""
    rows = loaded.table
    num_held_out = min(settings.eval_rows, max(1, round(len(rows) * HELD_OUT_SHARE)))
    cut = max(0, len(rows) - num_held_out)
    train_rows = StoredRows(rows.select(range(cut)), loaded.skipped)
    return _limited(train_rows, rows.select(range(cut, len(rows))), settings, seed)


def _limited(
    train_rows: StoredRows, held_out: Dataset, settings: PairsConfig, seed: int
) -> dict[str, StoredRows]:
    """Both parts with at most as many rows as the config says."""
    chosen, skipped = _at_most(train_rows.table, settings.max_pairs, seed), list(train_rows.skipped)
    num_left_out = len(train_rows.table) - len(chosen)
    if num_left_out:
        # Good rows all the same: the share of bad ones is one of the whole set.
        skipped.append({"_unused": "over_max_pairs", "_num": num_left_out})
    return {
        TRAIN: StoredRows(chosen, skipped),
        HELD_OUT: StoredRows(_at_most(held_out, settings.eval_rows, seed)),
    }


def _at_most(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """A random choice of the rows: neighbours share a question."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=seed, keep_in_memory=True).select(range(limit))
