"""Training a reward model on single answers, each with a label or a rating."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction

from rlhf_ray.algorithms.losses import pointwise_reward_loss
from rlhf_ray.config.supervised import PointwiseLoss, RewardConfig
from rlhf_ray.data.datasets.ratings import TargetColumn, load_ratings
from rlhf_ray.data.rendering.render import Renderer
from rlhf_ray.errors import DataError
from rlhf_ray.models import loading
from rlhf_ray.runs.datasets import user_rows
from rlhf_ray.stages.supervised.pairs import padded_texts, parts_of
from rlhf_ray.stages.supervised.trainers import RowMeanTrainer
from rlhf_ray.stages.supervised.training import HELD_OUT, Training

WORTH: dict[PointwiseLoss, TargetColumn] = {"bce": "label", "mse": "score"}
"""Loss -> the column that it learns."""


class RatingTrainer(RowMeanTrainer):
    """A Trainer whose predictions are each row's score and target, `_B2`."""

    def __init__(self, kind: PointwiseLoss, **parts: Any) -> None:
        super().__init__(**parts)
        self._kind: PointwiseLoss = kind

    def predict_rows(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = {name: tensor for name, tensor in inputs.items() if name != "targets"}
        scores_B = model(**texts).logits.float().squeeze(-1)
        loss = pointwise_reward_loss(scores_B, inputs["targets"], self._kind)
        return loss, torch.stack([scores_B, inputs["targets"]], dim=1)


def rated_batch(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Texts padded on the right, `_BS`, and ``targets``, `_B`."""
    targets_B = torch.tensor([row["target"] for row in rows])
    return padded_texts([row["token_ids"] for row in rows], pad_id) | {"targets": targets_B}


def agreement(kind: PointwiseLoss) -> Callable[[EvalPrediction], dict[str, float]]:
    """How well scores go with targets: ``auc`` of labels, Pearson's ``correlation`` of ratings."""

    def measure(prediction: EvalPrediction) -> dict[str, float]:
        predictions_B2: Any = prediction.predictions
        scores_B, targets_B = predictions_B2.astype(np.float64).T
        if kind == "bce":
            return {"auc": auc(scores_B[targets_B == 1], scores_B[targets_B == 0])}
        spread = scores_B.std() * targets_B.std()
        product = ((scores_B - scores_B.mean()) * (targets_B - targets_B.mean())).mean()
        return {"correlation": float(product / spread) if spread else 0.0}

    return measure


def auc(liked: np.ndarray, disliked: np.ndarray) -> float:
    """Share of all pairs of one of each in which the liked answer scores higher; a tie is half."""
    ordered = np.sort(disliked)
    ends = (np.searchsorted(ordered, liked, side) for side in ("left", "right"))
    return float(sum(end.mean() for end in ends) / 2 / len(ordered))


def load_training_ratings(
    training: Training, settings: RewardConfig
) -> tuple[dict[str, Dataset], dict[str, dict[str, int]]]:
    """Tokenised rows to train on and held out, and the counts of the rows read for each.

    Raises:
        DataError: no rows, too many that cannot be used, or held-out rows of one target.
    """
    config = training.config
    assert settings.loss != "pairwise"
    loaded = user_rows(config, "preferences", "ratings")
    renderer = Renderer(loading.load_tokenizer(training.base), config.template)
    target_column = WORTH[settings.loss]
    ratings: dict[str, Dataset] = {}
    counts: dict[str, dict[str, int]] = {}
    for part, rows in parts_of(loaded, settings, config.run.seed).items():
        ratings[part], counts[part] = load_ratings(
            rows,
            renderer,
            target_column,
            config.model.max_length,
            config.data.overlong,
            config.data.max_bad_share,
            f"reward's rated answers ({part.replace('_', '-')})",
        )
    if len(set(ratings[HELD_OUT]["target"])) < 2:
        raise DataError(
            f"reward.loss {settings.loss}: all {len(ratings[HELD_OUT])} held-out rows of "
            f"data.preferences have the same {target_column}, so nothing can be measured by them; "
            "shuffle the rows, or raise reward.eval_rows"
        )
    return ratings, counts
