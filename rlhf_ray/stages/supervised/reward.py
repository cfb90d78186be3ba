"""Stage reward: a reward model learns which answers people preferred, or how they rated each."""

import time
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from rlhf_ray.algorithms.losses import pairwise_reward_loss, pointwise_reward_loss
from rlhf_ray.algorithms.whitening import ROUNDING
from rlhf_ray.cluster.session import CARRIED
from rlhf_ray.config import Config
from rlhf_ray.config.supervised import PointwiseLoss
from rlhf_ray.data.datasets.ratings import TargetColumn, load_ratings
from rlhf_ray.data.reading.tables import TokenRow
from rlhf_ray.errors import DataError
from rlhf_ray.models import loading
from rlhf_ray.models.adapters import Model
from rlhf_ray.runs.datasets import user_rows
from rlhf_ray.runs.folder import RunFolder, absolute
from rlhf_ray.stages.supervised.launcher import open_training, run_training
from rlhf_ray.stages.supervised.pairs import (
    CHOSEN,
    REJECTED,
    PairTraining,
    load_stage_parts,
    load_training_pairs,
    padded_texts,
    split_rows,
)
from rlhf_ray.stages.supervised.reward_benchmark import benchmark
from rlhf_ray.stages.supervised.training import HELD_OUT, HELD_OUT_LOSS, TRAIN, Counts, Training

TARGETS: dict[PointwiseLoss, TargetColumn] = {"bce": "label", "mse": "score"}
"""Loss -> the column that is learnt."""


class _RewardModel(Training):
    """A LoRA adapter and a head over the SFT model, which may be quantised; or all weights."""

    name = "reward"

    @property
    def all_weights(self) -> bool:
        return self.config.reward.tuning == "full"

    def load_model(self) -> Model:
        settings, seed = self.model_settings, self.config.run.seed
        model = loading.load_sequence_classifier(self.base, settings, quantized=True, seed=seed)
        # The model finds the end of a text by looking for padding.
        model.config.pad_token_id = self.pad_id
        if self.all_weights:
            return self.partly_frozen(model, "score")
        return self.with_adapter(model, self.config.reward.lora, "SEQ_CLS")


class RewardTraining(_RewardModel, PairTraining):
    """Training on pairs of answers of which one was preferred."""

    def predict_rows(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the pairwise loss and the scores of both answers of each pair, `_BP`."""
        texts = {name: tensor for name, tensor in inputs.items() if name != "prompt_lengths"}
        flat = {name: tensor.flatten(0, 1) for name, tensor in texts.items()}
        scores_BP = model(**flat).logits.float().view(-1, 2)
        return self.mean_loss(scores_BP), scores_BP

    def mean_loss(self, scores_BP: Tensor) -> Tensor:
        """Return the pairwise loss."""
        chosen_B, rejected_B = scores_BP[:, CHOSEN], scores_BP[:, REJECTED]
        settings = self.config.reward
        return pairwise_reward_loss(chosen_B, rejected_B, settings.margin, settings.centre)


class RatedRewardTraining(_RewardModel):
    """Training on single answers, each with a label or a rating."""

    @property
    def loss(self) -> PointwiseLoss:
        """The kind of loss: of labels or of ratings."""
        assert self.config.reward.loss != "pairwise"
        return self.config.reward.loss

    def collate(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Pad texts on the right, `_BS`; ``targets`` are `_B`."""
        targets_B = torch.tensor([row["target"] for row in rows])
        return padded_texts([row["token_ids"] for row in rows], self.pad_id) | {
            "targets": targets_B
        }

    def predict_rows(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the pointwise loss, and the score and the target of each row, `_B2`."""
        texts = {name: tensor for name, tensor in inputs.items() if name != "targets"}
        scores_B = model(**texts).logits.float().squeeze(-1)
        loss = pointwise_reward_loss(scores_B, inputs["targets"], self.loss)
        return loss, torch.stack([scores_B, inputs["targets"]], dim=1)

    def measure(self, rows: np.ndarray) -> dict[str, float]:
        """Compute the loss, and ``auc`` of labels or Pearson's ``correlation`` of ratings."""
        scores_B, targets_B = rows.astype(np.float64).T
        given = torch.tensor(scores_B), torch.tensor(targets_B)
        loss = {HELD_OUT_LOSS: float(pointwise_reward_loss(*given, self.loss))}
        if self.loss == "bce":
            return loss | {"auc": auc(scores_B[targets_B == 1], scores_B[targets_B == 0])}
        return loss | {"correlation": correlation(scores_B, targets_B)}


def auc(liked: np.ndarray, disliked: np.ndarray) -> float:
    """Return the share of (liked, disliked) pairs that the liked answer wins; a tie is half."""
    ordered = np.sort(disliked)
    ends = (np.searchsorted(ordered, liked, side) for side in ("left", "right"))
    return float(sum(end.mean() for end in ends) / 2 / len(ordered))


def correlation(scores_B: np.ndarray, targets_B: np.ndarray) -> float:
    """Return Pearson's correlation; 0 where either varies by rounding alone."""
    if any(values_B.std() <= ROUNDING * abs(values_B).max() for values_B in (scores_B, targets_B)):
        return 0.0
    product = ((scores_B - scores_B.mean()) * (targets_B - targets_B.mean())).mean()
    return float(product / (scores_B.std() * targets_B.std()))


def run(config: Config) -> dict[str, object]:
    """Train a reward model on the SFT model, or take ``reward.path``; run ``reward.benchmark``.

    Returns:
        The summary: what `_train` returns and seconds, and ``benchmark`` where there is one.
    """
    start_s = time.monotonic()
    folder = RunFolder(config)
    summary = _summary_to_extend(folder)
    if summary is None:
        summary = _train(folder) | {"seconds": time.monotonic() - start_s}
        folder.write_summary("reward", summary)
    if config.reward.benchmark is not None:
        CARRIED.close()  # the scorers may need its GPUs
        summary |= {"benchmark": benchmark(config, _model(folder))}
        folder.write_summary("reward", summary)
    return summary


def _summary_to_extend(folder: RunFolder) -> dict[str, object] | None:
    """Return the summary of a model that only lacks its benchmark; None: train one first."""
    settings = folder.config.reward
    if settings.benchmark is None:
        return None
    if settings.path is not None:
        return {}
    summary = folder.summary("reward")
    return None if summary is None or "benchmark" in summary else summary


def _model(folder: RunFolder) -> str:
    path = folder.config.reward.path
    return absolute(path) if path else str(folder.path / "reward" / "model")


def _train(folder: RunFolder) -> dict[str, object]:
    """Write ``reward/model`` with its head: a PEFT folder, or a whole model with tuning full.

    Returns:
        pairs_train and pairs_eval (rated answers: rows_train and rows_eval), counts of rows,
        held-out accuracy (labels: auc, ratings: correlation) after and before, steps and sizes.
    """
    config, loss = folder.config, folder.config.reward.loss
    if loss == "pairwise":
        training = open_training(RewardTraining, config, folder.sft_model())
        data, counts = load_training_pairs(training)
        unit, measure = "pairs", "accuracy"
    else:
        training = open_training(RatedRewardTraining, config, folder.sft_model())
        data, counts = _load_ratings(training)
        unit, measure = "rows", "auc" if loss == "bce" else "correlation"
    trained = run_training(training, len(data[TRAIN]))
    return {
        f"{unit}_train": len(data[TRAIN]),
        f"{unit}_eval": len(data[HELD_OUT]),
        "rows": counts,
        measure: trained.after[measure],
        f"{measure}_before": trained.before[measure],
        **trained.sizes(),
    }


def _load_ratings(
    training: RatedRewardTraining,
) -> tuple[Mapping[str, Dataset], Mapping[str, Counts]]:
    """Load tokenised rows to train on and held out, and the counts of the rows read for each."""
    config, column = training.config, TARGETS[training.loss]
    rows = user_rows(config, "preferences", "ratings")
    parts = split_rows(rows, config.reward, config.run.seed, training.began_whole)
    load = partial(load_ratings, target_column=column)
    ratings, counts = load_stage_parts(training, parts, load, "reward's rated answers")
    if len(set(ratings[HELD_OUT]["target"])) < 2:
        raise DataError(
            f"reward.loss {training.loss}: all {len(ratings[HELD_OUT])} held-out rows of "
            f"data.preferences have the same {column}, so nothing can be measured by them; shuffle "
            "the rows, or raise reward.eval_rows"
        )
    return ratings, counts
