"""Stage 4: a reward model learns from pairs of answers which one people preferred."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from transformers import EvalPrediction, PreTrainedTokenizerBase, Trainer

from rlhf_ray.algorithms.losses import pairwise_reward_loss
from rlhf_ray.config import Config
from rlhf_ray.data.preferences import load_pairs
from rlhf_ray.data.sources import load_rows
from rlhf_ray.models import adapters, loading
from rlhf_ray.models.heads import position_ids
from rlhf_ray.stages.run_folder import RunFolder
from rlhf_ray.stages.supervised import open_training, run_training
from rlhf_ray.stages.training import HELD_OUT, HELD_OUT_SHARE, TRAIN, Training

CHOSEN, REJECTED = 0, 1
"""Places in the pair dimension, P, of every batch."""


class PairTrainer(Trainer):
    """Scores both answers of each pair; the pairwise loss; predictions are the scores, `_BP`."""

    def __init__(self, centre: float, **parts: Any) -> None:
        super().__init__(**parts)
        self._centre = centre
        # The loss is a mean over the pairs of a batch: let the Trainer average accumulated ones.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        pairs, _, length = inputs["input_ids"].shape
        flat = {name: tensor.view(2 * pairs, length) for name, tensor in inputs.items()}
        scores_BP = model(**flat).logits.float().view(pairs, 2)
        loss = pairwise_reward_loss(
            scores_BP[:, CHOSEN], scores_BP[:, REJECTED], centre=self._centre
        )
        return (loss, scores_BP) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            loss, scores_BP = self.compute_loss(model, self._prepare_inputs(inputs), True)
        return loss, scores_BP, torch.zeros_like(scores_BP)  # labels: the order is the label


class RewardTraining(Training):
    """A LoRA adapter and a scalar head over the SFT model, which is never quantised."""

    name = "reward"

    def load_model(self) -> Any:
        seed, lora = self.config.run.seed, self.config.reward.lora
        model = loading.load_sequence_classifier(self.base, self.config.model, seed=seed)
        # The model finds the end of a text by looking for padding.
        model.config.pad_token_id = self._pad_id
        return adapters.attach(model, lora, "SEQ_CLS", seed=seed, dropout=lora.dropout)

    def trainer(self, **parts: Any) -> Trainer:
        return PairTrainer(self.config.reward.centre, **parts)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pairs padded on the right to the longest text of the batch; each tensor `_BPS`."""
        longest = max(len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids"))
        shape = (len(rows), 2, longest)
        input_ids_BPS = torch.full(shape, self._pad_id)
        attention_BPS = torch.zeros(shape, dtype=torch.long)
        for index, row in enumerate(rows):
            for place, side in ((CHOSEN, "chosen_ids"), (REJECTED, "rejected_ids")):
                ids = torch.tensor(row[side])
                input_ids_BPS[index, place, : len(ids)] = ids
                attention_BPS[index, place, : len(ids)] = 1
        positions = position_ids(attention_BPS.flatten(0, 1)).view(shape)
        return {
            "input_ids": input_ids_BPS,
            "attention_mask": attention_BPS,
            "position_ids": positions,
        }

    @property
    def metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        return pair_accuracy

    def save(self, model: Any) -> None:
        tokenizer = loading.load_tokenizer(self.base)
        loading.save_adapter(model, tokenizer, self.folder / "model", self.base)

    @functools.cached_property
    def _pad_id(self) -> int:
        return int(loading.load_tokenizer(self.base).pad_token_id)  # type: ignore[arg-type]


def pair_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the pairs whose chosen answer scores higher; a tie counts as wrong."""
    scores_BP: Any = prediction.predictions
    return {"accuracy": float((scores_BP[:, CHOSEN] > scores_BP[:, REJECTED]).mean())}


def run(config: Config) -> dict[str, Any]:
    """Train a reward model on the SFT model; write ``reward/model``, a PEFT folder with its head.

    Returns:
        The summary: pairs_train, pairs_eval, held-out accuracy after and before, steps, seconds.

    Raises:
        RlhfError: no usable data or model, or the training failed.
    """
    start_s = time.monotonic()
    run_folder = RunFolder(config)
    training = open_training(RewardTraining, config, run_folder.sft_model())
    pairs, counts = _pairs(config, loading.load_tokenizer(training.base))
    numbers = run_training(training, pairs)
    summary = {
        "pairs_train": len(pairs[TRAIN]),
        "pairs_eval": len(pairs[HELD_OUT]),
        "rows": counts,
        "accuracy": numbers["after_accuracy"],
        "accuracy_before": numbers["before_accuracy"],
        "steps": config.reward.steps,
        "seconds": time.monotonic() - start_s,
    }
    run_folder.write_summary("reward", summary)
    return summary


def _pairs(
    config: Config, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Dataset], dict[str, dict[str, int]]]:
    """Tokenised pairs to train on and held out, and the counts of the rows read for each."""
    rows = _pair_rows(config)
    pairs: dict[str, Dataset] = {}
    counts: dict[str, dict[str, int]] = {}
    for part, chosen_rows in rows.items():
        pairs[part], counts[part] = load_pairs(
            chosen_rows,
            tokenizer,
            config.model.max_length,
            config.data.overlong,
            config.data.max_bad_share,
            f"reward's pairs ({part.replace('_', '-')})",
        )
    return pairs, counts


def _pair_rows(config: Config) -> dict[str, Dataset]:
    """Rows to train on and held out: the user's own, the last of them held out, or prepare's."""
    settings = config.reward
    source = config.data.preferences
    if source is None:
        run_folder = RunFolder(config)
        train_rows, held_out = (
            load_from_disk(str(run_folder.dataset(name))) for name in ("reward", "evaluation")
        )
        assert isinstance(train_rows, Dataset)
        assert isinstance(held_out, Dataset)
    else:
        rows = load_rows(source, ("prompt", "chosen", "rejected"))
        cut = len(rows) - min(settings.eval_rows, max(1, round(len(rows) * HELD_OUT_SHARE)))
        train_rows, held_out = rows.select(range(cut)), rows.select(range(cut, len(rows)))
    seed = config.run.seed
    return {
        TRAIN: _at_most(train_rows, settings.max_pairs, seed),
        HELD_OUT: _at_most(held_out, settings.eval_rows, seed),
    }


def _at_most(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """A random choice of the rows: neighbours share a question."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.shuffle(seed=seed, keep_in_memory=True).select(range(limit))
