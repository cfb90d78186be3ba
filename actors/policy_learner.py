"""The policy's learner: the clipped update of a LoRA adapter, and the adapter's export."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.learner import EngineKind, Learner
from actors.tally import Tally
from rlhf_ray.algorithms.experience import Assembled, Experience
from rlhf_ray.algorithms.kl import kl_estimate
from rlhf_ray.algorithms.logprobs import sampling_rule
from rlhf_ray.algorithms.policy_losses import resolve_policy_loss
from rlhf_ray.algorithms.token_weights import PolicyExperience, corrected
from rlhf_ray.algorithms.whitening import masked_mean, whiten, zero_padding
from rlhf_ray.config import Config
from rlhf_ray.engines.served_adapters import (
    TensorDict,
    digest,
    tensors_from_bytes,
    tensors_to_bytes,
)
from rlhf_ray.models.adapters import attach, load_adapter_state, peft_config
from rlhf_ray.models.forward import causal_lm_logits, response_logprobs
from rlhf_ray.models.loading import load_causal_lm
from rlhf_ray.models.stop_conditions import stop_token_ids
from rlhf_ray.models.token_logprobs import answer_with_logprobs, chunked_logprobs
from rlhf_ray.models.trainable import recompute_activations
from rlhf_ray.observability.phases import count
from rlhf_ray.types import AdapterUpdate, Mismatch, ProbeComparison, Rollout, SampleRequest

PROBE_SHIFT = 1.0
"""Nats per token by which a probe must move the prompts, if its base can be moved that far."""
PROBE_POSITIONS = 16
"""Last tokens of each prompt on which the shift is measured."""
PROBE_SCALES = [1e-3 * 1.5**step for step in range(18)]
"""Standard deviations to try for a probe's B; at the last, about 1, it dominates its base."""


class PolicyLearner(Learner):
    """Trains the adapter, without dropout, on log-probs under the engine's sampling rule.

    Dropout would make the log-probs differ from the engine's, and the ratio from 1 at the start.
    """

    grad_norm_name = "policy/grad_norm"
    skipped_name = "policy/steps_skipped"
    rate_name = "policy/learning_rate"

    def __init__(self, name: str, config: Config, model_path: str, engine: EngineKind) -> None:
        super().__init__(name, config, model_path, engine)
        self._policy_loss = resolve_policy_loss(config.ppo.policy_loss)
        self._rule = sampling_rule(
            config.rollout, stop_token_ids(model_path, config.template, config.model)
        )
        self.version: int | None = None  # of the last exported adapter; process titles show it
        self._correction: dict[str, float] = {}  # metrics, of the whole batch
        self._num_epochs = 0  # of the iteration
        self._ratios: list[float] = []  # mean ratio of each mini-batch over all ranks

    def _build_model(self) -> Any:
        config = self._config
        base = load_causal_lm(self._model_path, config.model, quantized=True)
        model = attach(
            answer_with_logprobs(base), config.lora, "CAUSAL_LM", seed=config.run.seed, dropout=0.0
        ).eval()
        return recompute_activations(model) if config.policy.gradient_checkpointing else model

    def _group(self) -> tuple[float, int, Mapping[str, Any]]:
        group = self._config.policy
        return self._config.ppo.learning_rate, group.zero_stage, group.deepspeed

    def logprobs(self, rollouts: Sequence[Rollout]) -> tuple[list[np.ndarray], Mismatch]:
        """Return [T] fp32 log-probs of each response's tokens, and the log-prob mismatch."""
        logprobs = self._logprobs(rollouts)
        engine = np.concatenate([rollout.rollout_logprobs for rollout in rollouts])
        error = np.abs(engine - np.concatenate(logprobs), dtype=np.float64)
        return logprobs, Mismatch(float(error.mean()), float(error.max()), len(error))

    def ref_logprobs(self, rollouts: Sequence[Rollout]) -> tuple[list[np.ndarray], None]:
        """Return [T] fp32 log-probs under the frozen base: a reference without a second model."""
        with self._without_adapter():
            return self._logprobs(rollouts), None

    def sample_kl(
        self, rollouts: Sequence[Rollout], ref_logprobs: Sequence[np.ndarray]
    ) -> tuple[float, ...]:
        """Return [N] token sums of k1 between the current policy and the reference, nats."""
        pairs = zip(self._logprobs(rollouts), ref_logprobs, strict=True)
        return tuple(float(np.sum(own - ref, dtype=np.float64)) for own, ref in pairs)

    def _logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        return response_logprobs(
            self._engine.model,
            rollouts,
            rule=self._rule,
            max_tokens=self._config.ppo.max_tokens_per_micro_batch,
            device=self._engine.device,
        )

    def _whiten(self, mean: float, std: float) -> None:
        batch = self._experience
        advantages_BT = whiten(batch.advantages_BT, batch.mask_BT, mean, std)
        self._experience = dataclasses.replace(batch, advantages_BT=advantages_BT)

    def _learnt_from(self, whole: Assembled) -> Experience:
        batch, self._correction = corrected(whole.experience, self._config.ppo, whole.cut_off_B)
        return batch

    def _weighted(self, batch: Experience) -> Experience:
        assert isinstance(batch, PolicyExperience), "`_learnt_from` makes one"
        return batch.weighted(self._config.ppo, self._config.rollout.max_tokens)

    def _learning_rate(self, iteration: int, num_idle: int = 0) -> float:
        return super()._learning_rate(iteration, self._config.ppo.critic_warmup)

    def _ends_after(self, epoch: Tally) -> bool:
        """Return whether the mean KL of an epoch's mini-batches, of all ranks, is too large."""
        self._num_epochs += 1
        bound = self._config.ppo.stop_kl
        if bound is None:
            return False
        total = self._engine.sum_over_ranks(epoch.total("policy/approxkl_avg"))
        return total / sum(self._mini_batch_tokens) > bound

    def _loss(self, batch: Experience, num_tokens: float) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert isinstance(batch, PolicyExperience), "`_learnt_from` makes one"
        ppo = self._config.ppo
        logprobs_BT, entropy_BT = chunked_logprobs(
            self._engine.model,
            batch.sequences_BS,
            batch.attention_BS,
            batch.prompt_lengths_B,
            batch.responses_BT,
            rule=self._rule,
            entropy="gradient" if ppo.entropy_coef else "value",
        )
        loss, stats = self._policy_loss(
            logprobs_BT,
            batch.old_logprobs_BT,
            batch.advantages_BT,
            batch.mask_BT,
            clip_low=ppo.clip_range,
            clip_high=ppo.clip_range_high or ppo.clip_range,
            dual_clip=ppo.dual_clip,
            weights=batch.weights_BT * batch.importance_BT,
            num_tokens=num_tokens,
        )
        means = {
            "loss/policy_avg": loss.detach() * num_tokens / max(batch.num_tokens, 1),
            "policy/approxkl_avg": stats["approxkl"],
            "policy/clipfrac_avg": stats["clipfrac"],
            "policy/entropy_avg": masked_mean(entropy_BT.detach(), batch.mask_BT),
            "val/ratio": stats["ratio"],
            "val/ratio_max": stats["ratio_max"],
        }
        if ppo.entropy_coef:
            loss = loss - ppo.entropy_coef * batch.weighted_sum(entropy_BT) / num_tokens
        if ppo.kl_in == "loss":
            # Zero the padding before k3's exponential: an overflow there makes the gradient NaN.
            own_BT, ref_BT = (
                zero_padding(part, batch.mask_BT) for part in (logprobs_BT, batch.ref_logprobs_BT)
            )
            kl_BT = kl_estimate(own_BT, ref_BT, ppo.kl_estimator)
            loss = loss + self._kl_coef * batch.weighted_sum(kl_BT) / num_tokens
            means["loss/kl_avg"] = masked_mean(kl_BT.detach(), batch.mask_BT)
        return loss, means

    def _moves_weights(self, mini_batch: Tally, num_tokens: int) -> bool:
        """Return False if the mean ratio over all ranks' tokens exceeds guards.ratio."""
        guard = self._config.guards.ratio
        if guard.action == "off":
            return True
        mean = self._engine.sum_over_ranks(mini_batch.total("val/ratio")) / num_tokens
        self._ratios.append(math.inf if math.isnan(mean) else mean)
        return guard.action == "warn" or self._ratios[-1] <= guard.max_mean

    def _report(self) -> dict[str, float]:
        ratios, self._ratios = self._ratios, []
        num_epochs, self._num_epochs = self._num_epochs, 0
        metrics = dict(self._correction)
        if self._config.ppo.stop_kl is not None:
            metrics["policy/epochs"] = float(num_epochs)
        if ratios:
            bound = self._config.guards.ratio.max_mean
            metrics["val/ratio_minibatch_max"] = max(ratios)
            metrics["policy/ratio_exceeded"] = float(sum(ratio > bound for ratio in ratios))
        return metrics

    def adapter(self, version: int) -> tuple[bytes, AdapterUpdate]:
        """Return the current adapter's description, and rank 0 its bytes. All ranks must call."""
        self.version = version
        return self._update(version, self._read_adapter())

    def zero_adapter(self, version: int) -> tuple[bytes, AdapterUpdate]:
        """Return an adapter that changes nothing: its B is zero. All ranks must call."""
        state = self._read_adapter()
        zero = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in state.items()}
        return self._update(version, zero)

    def probe(self, version: int, prompts: Sequence[SampleRequest]) -> tuple[bytes, AdapterUpdate]:
        """Return a seeded random adapter, scaled until it moves the prompts by PROBE_SHIFT nats.

        The shift is KL(probe || base): the mean shift of tokens that the probe samples. An
        untrained base cannot be moved that far, because its logits lie within a narrow band
        whatever its layers compute; the probe is then the smallest one that reaches half of the
        largest shift. All ranks must call.
        """
        generator = torch.Generator().manual_seed(self._config.run.seed)
        state = self._read_adapter()
        noise = {
            name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            for name, tensor in state.items()
        }

        def scaled(scale: float) -> TensorDict:
            return {
                name: noise[name] * (scale if "lora_B" in name else tensor.shape[1] ** -0.5)
                for name, tensor in state.items()
            }

        shifts: dict[float, float] = {}
        for scale in PROBE_SCALES:
            # The group's mean: ranks whose kernels differ a little must choose the same scale.
            shift = self._engine.sum_over_ranks(self._mean_shift(scaled(scale), prompts))
            shifts[scale] = shift / self._engine.world_size
            count(1, "probes tried")
            if shifts[scale] >= PROBE_SHIFT:
                return self._update(version, scaled(scale))
        half = max(shifts.values()) / 2
        return self._update(version, scaled(next(s for s in PROBE_SCALES if shifts[s] >= half)))

    @torch.no_grad()
    def _mean_shift(self, probe: TensorDict, prompts: Sequence[SampleRequest]) -> float:
        """Return KL(probe || base), a mean over each prompt's last tokens.

        Distributions over the vocabulary at every position would take too much memory.
        """
        ids_BS = torch.tensor([prompt.prompt.token_ids for prompt in prompts])
        ids_BS = ids_BS.to(self._engine.device)
        forward = causal_lm_logits(self._engine.model, last=PROBE_POSITIONS)
        temperature = self._config.rollout.temperature

        def distribution() -> Tensor:
            logits_BTV = forward(ids_BS, torch.ones_like(ids_BS)).float()
            return (logits_BTV / temperature).log_softmax(-1)

        with self._adapter_as(probe):
            probe_BTV = distribution()
        with self._without_adapter():
            base_BTV = distribution()
        return float((probe_BTV.exp() * (probe_BTV - base_BTV)).sum(-1).mean())

    def compare(
        self, update: AdapterUpdate, tensors: bytes, rollouts: Sequence[Rollout]
    ) -> ProbeComparison:
        """Compare what an engine sampled under an adapter with the learner. All ranks must call."""
        with self._adapter_as(tensors_from_bytes(tensors)):
            learner = np.concatenate(self._logprobs(rollouts))
        with self._without_adapter():
            base = np.concatenate(self._logprobs(rollouts))
        engine = np.concatenate([rollout.rollout_logprobs for rollout in rollouts])
        return compare_shifts(engine, learner, base)

    @contextmanager
    def _adapter_as(self, state: TensorDict) -> Iterator[None]:
        """Compute with another adapter within the block, then restore the policy's own."""
        own = self._read_adapter()
        self._write_adapter(state)
        try:
            yield
        finally:
            self._write_adapter(own)

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        with self._engine.module.disable_adapter():  # type: ignore[operator]
            yield

    # At ZeRO stage 3 each rank holds a part of the adapter: reading and writing gathers it first,
    # which is a collective. So every caller of these two runs on all ranks.

    @property
    def _adapted(self) -> Any:
        return self._engine.module

    def _write_adapter(self, state: TensorDict) -> None:
        with self._engine.whole_parameters():
            load_adapter_state(self._adapted, state)

    def _update(self, version: int, state: TensorDict) -> tuple[bytes, AdapterUpdate]:
        settings = peft_config(self._adapted)
        sent = tensors_to_bytes(state) if self._engine.rank == 0 else b""
        return sent, AdapterUpdate(version, digest(state), settings, None)


def compare_shifts(engine: np.ndarray, learner: np.ndarray, base: np.ndarray) -> ProbeComparison:
    """Compare the shift that an adapter causes in the engine's log-probs with the learner's shift.

    Args:
        engine: [N] engine's log-probs of sampled tokens, nats.
        learner: [N] learner's log-probs with the adapter, nats.
        base: [N] learner's log-probs without the adapter, nats.
    """
    learner_shift = np.subtract(learner, base, dtype=np.float64)
    engine_shift = np.subtract(engine, base, dtype=np.float64)
    shift = float(np.sqrt(np.mean(learner_shift**2)))
    error = np.abs(engine_shift - learner_shift)
    return ProbeComparison(
        shift=shift,
        # The projection on the learner's shift: in a plain mean, opposite signs would cancel.
        engine_shift=float(np.mean(engine_shift * learner_shift)) / shift if shift else 0.0,
        error=float(np.mean(error)),
        largest=float(np.max(error)),
    )
