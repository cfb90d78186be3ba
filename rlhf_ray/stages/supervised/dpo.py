"""Stage dpo: the policy learns from pairs directly, without a reward model and without sampling."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from rlhf_ray.algorithms.experience import response_logits
from rlhf_ray.algorithms.losses import dpo_loss
from rlhf_ray.config import Config
from rlhf_ray.config.supervised import DpoConfig
from rlhf_ray.models import adapters, loading
from rlhf_ray.models.dropout import without_dropout
from rlhf_ray.models.quantization import ready_for_adapter
from rlhf_ray.models.token_logprobs import answer_with_logprobs, chunked_logprobs
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.launcher import open_training, run_training
from rlhf_ray.stages.supervised.pairs import (
    CHOSEN,
    REJECTED,
    PairTraining,
    load_training_pairs,
)
from rlhf_ray.stages.supervised.trainers import RowMeanTrainer
from rlhf_ray.stages.supervised.training import HELD_OUT, TRAIN, sizes


class DpoTrainer(RowMeanTrainer):
    """Implicit rewards of both answers, `_BP`: beta times the log-ratio of policy and reference.

    The reference is the policy's own base with the adapter off.
    """

    def __init__(self, settings: DpoConfig, **parts: Any) -> None:
        super().__init__(**parts)
        self._settings = settings

    def predict_rows(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        logprobs_BP = completion_logprobs(model, inputs)
        wrapped: Any = self.accelerator.unwrap_model(model)
        with torch.no_grad(), wrapped.disable_adapter():
            ref_BP = completion_logprobs(wrapped, inputs)
        log_ratios_BP = logprobs_BP - ref_BP
        settings = self._settings
        loss = dpo_loss(
            log_ratios_BP[:, CHOSEN],
            log_ratios_BP[:, REJECTED],
            settings.beta,
            settings.loss,
            settings.label_smoothing,
        )
        return loss, settings.beta * log_ratios_BP


def completion_logprobs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Summed log-prob of each completion given its prompt, `_BP`, nats.

    Args:
        model: causal LM that `answer_with_logprobs` taught.
        inputs: a batch of `PairTraining.collate`.
    """
    pairs, sides, _ = inputs["input_ids"].shape
    ids_NS = inputs["input_ids"].flatten(0, 1)
    attention_NS = inputs["attention_mask"].flatten(0, 1)
    prompts_N = inputs["prompt_lengths"].repeat_interleave(sides)
    lengths_N = attention_NS.sum(dim=1) - prompts_N
    places_T = torch.arange(int(lengths_N.max()), device=ids_NS.device)
    tokens_NT = response_logits(ids_NS[:, 1:], prompts_N, len(places_T))
    (logprobs_NT,) = chunked_logprobs(model, ids_NS, attention_NS, prompts_N, tokens_NT)
    of_completion_NT = places_T < lengths_N.unsqueeze(1)
    return (logprobs_NT * of_completion_NT).sum(-1).view(pairs, sides)


class DpoTraining(PairTraining):
    """A LoRA adapter over the SFT model, which may be quantised.

    The model's own dropout is off: policy and reference would else draw unlike masks, and their
    log-ratio would be noise.
    """

    name = "dpo"

    def load_model(self) -> Any:
        settings, lora = self.model_settings, self.config.dpo.lora
        model = loading.load_causal_lm(self.base, settings, quantized=True)
        return adapters.attach(
            ready_for_adapter(answer_with_logprobs(without_dropout(model)), settings),
            lora,
            "CAUSAL_LM",
            seed=self.config.run.seed,
            dropout=lora.dropout,
        )

    def save(self, model: Any) -> None:
        self.save_adapter(model)

    def trainer(self, **parts: Any) -> Trainer:
        return DpoTrainer(self.config.dpo, **parts)


def run(config: Config) -> dict[str, Any]:
    """Train the SFT model on pairs; write ``dpo/model``, a PEFT folder.

    Returns:
        The summary: pairs_train, pairs_eval, share of held-out pairs whose chosen answer has the
        higher implicit reward, held-out loss before and after, steps, seconds.

    Raises:
        RlhfError: no usable data or model, or the training failed.
    """
    start_s = time.monotonic()
    run_folder = RunFolder(config)
    training = open_training(DpoTraining, config, run_folder.sft_model())
    pairs, counts = load_training_pairs(training)
    numbers = run_training(training, pairs)
    summary = {
        "pairs_train": len(pairs[TRAIN]),
        "pairs_eval": len(pairs[HELD_OUT]),
        "rows": counts,
        "accuracy": numbers["after_accuracy"],
        "loss_before": numbers["before_loss"],
        "loss_after": numbers["after_loss"],
        **sizes(numbers),
        "seconds": time.monotonic() - start_s,
    }
    run_folder.write_summary("dpo", summary)
    return summary
