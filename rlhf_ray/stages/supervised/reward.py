"""Stage 4: a reward model learns which answers people preferred, or how they rated each."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import EvalPrediction, Trainer

from rlhf_ray.algorithms.losses import pairwise_reward_loss
from rlhf_ray.config import Config
from rlhf_ray.config.supervised import PointwiseLoss
from rlhf_ray.models import adapters, loading
from rlhf_ray.models.quantization import ready_for_adapter
from rlhf_ray.runs.folder import RunFolder, absolute
from rlhf_ray.stages.supervised.launcher import open_training, run_training
from rlhf_ray.stages.supervised.pairs import (
    CHOSEN,
    REJECTED,
    PairTraining,
    load_training_pairs,
)
from rlhf_ray.stages.supervised.ratings import (
    RatingTrainer,
    agreement,
    load_training_ratings,
    rated_batch,
)
from rlhf_ray.stages.supervised.reward_benchmark import benchmark
from rlhf_ray.stages.supervised.trainers import RowMeanTrainer
from rlhf_ray.stages.supervised.training import HELD_OUT, TRAIN, Training, sizes


class RewardTrainer(RowMeanTrainer):
    """Scores both answers of each pair, `_BP`; the pairwise loss."""

    def __init__(self, centre: float, **parts: Any) -> None:
        super().__init__(**parts)
        self._centre = centre

    def predict_rows(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        texts = {name: tensor for name, tensor in inputs.items() if name != "prompt_lengths"}
        flat = {name: tensor.flatten(0, 1) for name, tensor in texts.items()}
        scores_BP = model(**flat).logits.float().view(-1, 2)
        loss = pairwise_reward_loss(
            scores_BP[:, CHOSEN], scores_BP[:, REJECTED], centre=self._centre
        )
        return loss, scores_BP


class _RewardModel(Training):
    """A LoRA adapter and a head over the SFT model, which may be quantised; or all weights."""

    name = "reward"

    @property
    def all_weights(self) -> bool:
        return self.config.reward.tuning == "full"

    def load_model(self) -> Any:
        settings, seed = self.model_settings, self.config.run.seed
        model = loading.load_sequence_classifier(self.base, settings, quantized=True, seed=seed)
        # The model finds the end of a text by looking for padding.
        model.config.pad_token_id = self._pad_id
        if self.all_weights:
            return self.partly_frozen(model, "score")
        model, lora = ready_for_adapter(model, settings), self.config.reward.lora
        return adapters.attach(model, lora, "SEQ_CLS", seed=seed, dropout=lora.dropout)

    def save(self, model: Any) -> None:
        if self.all_weights:
            self.save_whole(model)
        else:
            self.save_adapter(model)


class RewardTraining(_RewardModel, PairTraining):
    """On pairs of answers of which one was preferred."""

    def trainer(self, **parts: Any) -> Trainer:
        return RewardTrainer(self.config.reward.centre, **parts)


class RatedRewardTraining(_RewardModel):
    """On single answers with a label or a rating."""

    @property
    def _kind(self) -> PointwiseLoss:
        assert self.config.reward.loss != "pairwise"
        return self.config.reward.loss

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return rated_batch(rows, self._pad_id)

    @property
    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        return agreement(self._kind)

    def trainer(self, **parts: Any) -> Trainer:
        return RatingTrainer(self._kind, **parts)


def run(config: Config) -> dict[str, Any]:
    """Train a reward model on the SFT model, or take the given one; measure it by the benchmark.

    Returns:
        The summary: of the training (what `_train` returns, seconds), and ``benchmark`` where
        there is one.

    Raises:
        RlhfError: no usable data or model, or the training failed.
    """
    start_s = time.monotonic()
    folder = RunFolder(config)
    summary = _unmeasured(folder)
    if summary is None:
        summary = _train(folder) | {"seconds": time.monotonic() - start_s}
        folder.write_summary("reward", summary)
    if config.reward.benchmark is not None:
        summary |= {"benchmark": benchmark(config, _model(folder))}
        folder.write_summary("reward", summary)
    return summary


def _unmeasured(folder: RunFolder) -> dict[str, Any] | None:
    """The summary of a model that is there and waits for its benchmark; None: train one."""
    settings = folder.config.reward
    if settings.benchmark is None:
        return None
    if settings.path is not None:
        return {}
    summary = folder.summary("reward")
    return None if summary is None or "benchmark" in summary else summary


def _model(folder: RunFolder) -> str:
    given = folder.config.reward.path
    return absolute(given) if given else str(folder.path / "reward" / "model")


def _train(folder: RunFolder) -> dict[str, Any]:
    """Write ``reward/model`` with its head: a PEFT folder, or a whole model with tuning full.

    Returns:
        pairs_train and pairs_eval (rated answers: rows_train and rows_eval), counts of rows,
        held-out accuracy (labels: auc, ratings: correlation) after and before, steps and sizes.
    """
    config, settings = folder.config, folder.config.reward
    if settings.loss == "pairwise":
        training = open_training(RewardTraining, config, folder.sft_model())
        data, counts = load_training_pairs(training)
        unit, measure = "pairs", "accuracy"
    else:
        training = open_training(RatedRewardTraining, config, folder.sft_model())
        data, counts = load_training_ratings(training, settings)
        unit, measure = "rows", "auc" if settings.loss == "bce" else "correlation"
    numbers = run_training(training, data)
    return {
        f"{unit}_train": len(data[TRAIN]),
        f"{unit}_eval": len(data[HELD_OUT]),
        "rows": counts,
        measure: numbers[f"after_{measure}"],
        f"{measure}_before": numbers[f"before_{measure}"],
        **sizes(numbers),
    }
