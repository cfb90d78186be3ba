"""The critic's learner: values of states and the clipped value update."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from peft import PeftModel
from torch import Tensor

from actors.learner import Learner
from rlhf_ray.algorithms.experience import Assembled, Experience, response_logits
from rlhf_ray.algorithms.losses import explained_variance, value_loss
from rlhf_ray.models.adapters import (
    attach,
    merge_into_base,
)
from rlhf_ray.models.forward import ValueModel, response_values
from rlhf_ray.models.loading import load_sequence_classifier
from rlhf_ray.models.trainable import recompute_activations
from rlhf_ray.types import Rollout


class CriticLearner(Learner):
    """Trains an adapter and a value head.

    The head starts at zero, or with ``critic.init: reward`` as the reward model's trained head.
    """

    grad_norm_name = "val/grad_norm"
    skipped_name = "val/steps_skipped"
    rate_name = "val/learning_rate"

    def _build_model(self) -> Any:
        config = self._config
        from_scores = config.critic.init == "reward"
        base = load_sequence_classifier(
            self._model_path,
            config.model,
            zero_head=not from_scores,
            require_head=from_scores,
            quantized=True,
        )
        if isinstance(base, PeftModel):
            base, _ = merge_into_base(base)
        # Not the policy's seed: adapters of the same shape would start with equal weights.
        classifier = attach(
            base, config.critic.lora, "SEQ_CLS", seed=config.run.seed + 1, dropout=0.0
        )
        model = ValueModel(classifier).eval()
        if config.critic.gradient_checkpointing:
            recompute_activations(classifier)
        return model

    def _group(self) -> tuple[float, int, Mapping[str, Any]]:
        group = self._config.critic
        return group.learning_rate, group.zero_stage, group.deepspeed

    def _forward(self, sequences_BS: Tensor, attention_BS: Tensor) -> Tensor:
        return self._engine.model(sequences_BS, attention_BS)

    def values(self, rollouts: Sequence[Rollout]) -> tuple[list[np.ndarray], None]:
        """Return [T] fp32 values of the states in which each response's tokens were chosen.

        With ``ppo.score_position: first_pad``, or to bootstrap, a row has one more: the state after
        the last token.
        """
        ppo = self._config.ppo
        values = response_values(
            self._forward,
            rollouts,
            one_behind=ppo.score_position == "first_pad" or ppo.overlong.truncated == "bootstrap",
            max_tokens=ppo.max_tokens_per_micro_batch,
            device=self._engine.device,
        )
        return values, None

    def _learnt_from(self, whole: Assembled) -> Experience:
        """Mask the batch to the critic's tokens, and keep the explained variance of its returns.

        Here, because every rank has the whole batch: of its own rows alone, a rank would compare
        with their mean, and a mean over ranks is not the variance that the batch explains.
        """
        batch = dataclasses.replace(whole.experience, mask_BT=whole.value_mask_BT)
        self._explained_variance = explained_variance(
            batch.values_BT, batch.returns_BT, batch.mask_BT
        )
        return batch

    def _whiten(self, mean: float, std: float) -> None:
        """Do nothing: the critic learns returns, which are not whitened."""

    def _loss(self, batch: Experience, num_tokens: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        values_BS = self._forward(batch.sequences_BS, batch.attention_BS)
        loss, stats = value_loss(
            response_logits(values_BS, batch.prompt_lengths_B, batch.mask_BT.shape[1]),
            batch.values_BT,
            batch.returns_BT,
            batch.mask_BT,
            self._config.ppo.value_clip_range,
            num_tokens=num_tokens,
        )
        return loss, {
            "loss/value_avg": loss.detach() * num_tokens / max(batch.num_tokens, 1),
            "val/clipfrac_avg": stats["clipfrac"],
        }

    def _report(self) -> dict[str, float]:
        return {"val/explained_variance": self._explained_variance}

    @property
    def _adapted(self) -> Any:
        return self._engine.module.classifier
