"""Stage dpo: the policy learns from pairs directly, without a reward model and without sampling."""

import time
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from torch import Tensor, nn

from rlhf_ray.algorithms.experience import response_logits
from rlhf_ray.algorithms.losses import dpo_loss
from rlhf_ray.config import Config
from rlhf_ray.models import loading
from rlhf_ray.models.token_logprobs import answer_with_logprobs, chunked_logprobs
from rlhf_ray.models.trainable import without_dropout
from rlhf_ray.runs.folder import RunFolder
from rlhf_ray.stages.supervised.launcher import open_training, run_training
from rlhf_ray.stages.supervised.pairs import CHOSEN, REJECTED, PairTraining, load_training_pairs
from rlhf_ray.stages.supervised.training import HELD_OUT, TRAIN


class DpoTraining(PairTraining):
    """A LoRA adapter over the SFT model, which may be quantised.

    The reference is the policy's own base with the adapter off. The model's own dropout is off:
    policy and reference would else draw unlike masks, and their log-ratio would be noise.
    """

    name = "dpo"

    def load_model(self) -> PeftModel:
        model = loading.load_causal_lm(self.base, self.model_settings, quantized=True)
        model = answer_with_logprobs(without_dropout(model))
        return self.with_adapter(model, self.config.dpo.lora, "CAUSAL_LM")

    def predict_rows(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the loss and the implicit rewards, `_BP`: beta times the log-ratio it uses."""
        settings = self.config.dpo
        logprobs_BP = completion_logprobs(model, inputs)
        policy: Any = extract_model_from_parallel(model)  # as torch.compile leaves it, too
        with torch.no_grad(), policy.disable_adapter():
            ref_BP = completion_logprobs(policy, inputs)
        log_ratios_BP = logprobs_BP - ref_BP
        if settings.per_token:
            log_ratios_BP = log_ratios_BP / completion_lengths(inputs)
        return self._loss(log_ratios_BP), settings.beta * log_ratios_BP

    def mean_loss(self, scores_BP: Tensor) -> Tensor:
        """Return the loss, given implicit rewards."""
        return self._loss(scores_BP / self.config.dpo.beta)

    def _loss(self, log_ratios_BP: Tensor) -> Tensor:
        settings = self.config.dpo
        return dpo_loss(
            log_ratios_BP[:, CHOSEN],
            log_ratios_BP[:, REJECTED],
            settings.beta,
            settings.loss,
            settings.label_smoothing,
        )


def completion_logprobs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the summed log-prob of each completion given its prompt, `_BP`, nats.

    The inputs are a batch of `PairTraining.collate`.
    """
    num_pairs, num_sides, _ = inputs["input_ids"].shape
    ids_NS = inputs["input_ids"].flatten(0, 1)
    attention_NS = inputs["attention_mask"].flatten(0, 1)
    prompts_N = inputs["prompt_lengths"].repeat_interleave(num_sides)
    lengths_N = completion_lengths(inputs).flatten()
    positions_T = torch.arange(int(lengths_N.max()), device=ids_NS.device)
    tokens_NT = response_logits(ids_NS[:, 1:], prompts_N, len(positions_T))
    (logprobs_NT,) = chunked_logprobs(model, ids_NS, attention_NS, prompts_N, tokens_NT)
    completion_mask_NT = positions_T < lengths_N.unsqueeze(1)
    return (logprobs_NT * completion_mask_NT).sum(-1).view(num_pairs, num_sides)


def completion_lengths(inputs: dict[str, Tensor]) -> Tensor:
    """Return the number of tokens of each completion, end token included, `_BP`."""
    return inputs["attention_mask"].sum(-1) - inputs["prompt_lengths"].unsqueeze(1)


def run(config: Config) -> dict[str, object]:
    """Train the SFT model on pairs; write ``dpo/model``, a PEFT folder.

    Returns:
        The summary: pairs_train, pairs_eval, share of held-out pairs whose chosen answer has the
        higher implicit reward, held-out loss before and after, steps, seconds.
    """
    start_s = time.monotonic()
    run_folder = RunFolder(config)
    training = open_training(DpoTraining, config, run_folder.sft_model())
    pairs, counts = load_training_pairs(training)
    trained = run_training(training, len(pairs[TRAIN]))
    summary = {
        "pairs_train": len(pairs[TRAIN]),
        "pairs_eval": len(pairs[HELD_OUT]),
        "rows": counts,
        "accuracy": trained.after["accuracy"],
        "loss_before": trained.before["loss"],
        "loss_after": trained.after["loss"],
        **trained.sizes(),
        "seconds": time.monotonic() - start_s,
    }
    run_folder.write_summary("dpo", summary)
    return summary
