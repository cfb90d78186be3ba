"""The distribution that next tokens are sampled from: its logits, log-probs and entropy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.config.rollout import RolloutConfig


@dataclass(frozen=True, slots=True)
class SamplingRule:
    """The sampling settings that define the distribution of tokens; log-probs are under it."""

    temperature: float = 1.0
    """Divisor of the logits, > 0."""
    top_k: int = 0
    """Keep this many of the likeliest tokens, and those that tie with the last; 0: all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that hold this share of the probability, at least one; 1: all."""
    min_tokens: int = 0
    """Number of response tokens before which no stop token is drawn."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end a response, and are part of it."""

    def __post_init__(self) -> None:
        can_draw = self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1
        if not (can_draw and self.min_tokens >= 0):
            raise ValueError(
                f"no way to draw tokens: {self}; temperature must be > 0 (greedy decoding has no "
                "ratio), top_k and min_tokens >= 0, top_p in (0, 1]"
            )

    def logits(
        self, logits_BTV: Tensor, tokens_BT: Tensor | None = None, steps_BT: Tensor | None = None
    ) -> Tensor:
        """Return logits whose softmax is the distribution that tokens are drawn from.

        First early stop tokens are removed, then temperature, top-k, and top-p on the rest are
        applied: the order of vLLM, whose log-probs these must equal. Top-k and top-p always keep
        the given tokens. These were drawn, but an updated policy, or the reference, may not have
        them among its likeliest: so their log-prob stays finite, and a ratio that fell has a
        gradient. An early stop token is never drawn: its log-prob is -inf.

        Args:
            logits_BTV: logits of the model, any floating dtype, any number of leading dimensions.
            tokens_BT: token ids to keep, one per position.
            steps_BT: number of response tokens before each position, or a tensor that broadcasts
                to that; required with ``min_tokens``.

        Returns:
            fp32 `_BTV`, -inf on tokens that are never drawn; differentiable in the others.

        Raises:
            ValueError: ``min_tokens`` is set, and ``steps_BT`` is missing.
        """
        scaled_BTV = self._without_early_stops(logits_BTV.float(), steps_BT)
        if self.temperature != 1.0:
            scaled_BTV = scaled_BTV / self.temperature
        if self.top_k == 0 and self.top_p == 1:
            return scaled_BTV
        kept_BTV = self._kept(scaled_BTV.detach())
        if tokens_BT is not None:
            kept_BTV = kept_BTV.scatter(-1, tokens_BT.unsqueeze(-1), True)
        return scaled_BTV.masked_fill(~kept_BTV, -torch.inf)

    def _without_early_stops(self, logits_BTV: Tensor, steps_BT: Tensor | None) -> Tensor:
        if self.min_tokens == 0:
            return logits_BTV
        if steps_BT is None:
            raise ValueError(f"min_tokens {self.min_tokens} needs the place of each token")
        is_stop_V = torch.zeros(logits_BTV.shape[-1], dtype=torch.bool, device=logits_BTV.device)
        is_stop_V[list(self.stop_token_ids)] = True
        is_early_BT1 = (steps_BT < self.min_tokens).unsqueeze(-1)
        return logits_BTV.masked_fill(is_early_BT1 & is_stop_V, -torch.inf)

    def _kept(self, scaled_BTV: Tensor) -> Tensor:
        if 0 < self.top_k < scaled_BTV.shape[-1]:
            last_BT1 = scaled_BTV.topk(self.top_k, dim=-1).values[..., -1:]
            scaled_BTV = scaled_BTV.masked_fill(scaled_BTV < last_BT1, -torch.inf)
        kept_BTV = scaled_BTV > -torch.inf
        if self.top_p < 1:
            ascending_BTV, order_BTV = scaled_BTV.sort(dim=-1)
            tail_BTV = ascending_BTV.softmax(dim=-1).cumsum(dim=-1)
            dropped_BTV = tail_BTV <= 1 - self.top_p
            dropped_BTV[..., -1] = False
            kept_BTV &= ~torch.empty_like(dropped_BTV).scatter(-1, order_BTV, dropped_BTV)
        return kept_BTV


def sampling_rule(rollout: RolloutConfig, stop_token_ids: tuple[int, ...]) -> SamplingRule:
    """Return the rule that engines sample by; every log-prob of a run is of its distribution."""
    return SamplingRule(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_tokens=rollout.min_tokens,
        stop_token_ids=() if rollout.ignore_eos else stop_token_ids,
    )


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the log-prob, in nats, of each token under softmax(logits / temperature).

    Logits at position t must predict token t: align them first (`experience.response_logits`).

        log p(x) = z_x - logsumexp(z),  z = logits / temperature

    Not by log-softmax, which would hold a second tensor of the size of the logits, the largest
    tensor of a training step.

    Args:
        logits_BTV: logits over the vocabulary V, any floating dtype.
        tokens_BT: token ids in [0, V); padding needs a valid id too.
        temperature: > 0; the temperature that the tokens were sampled with.

    Returns:
        fp32 `_BT`, differentiable in the logits.
    """
    scaled_BTV = _scale(logits_BTV, temperature)
    chosen_BT = scaled_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)
    return chosen_BT - torch.logsumexp(scaled_BTV, dim=-1)


def entropy(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the entropy H = -sum_v p_v log p_v of softmax(logits / temperature), nats, fp32 `_BT`.

    Tokens with a logit of -inf have probability 0 and add nothing.
    """
    logp_BTV = torch.log_softmax(_scale(logits_BTV, temperature), dim=-1)
    finite_logp_BTV = logp_BTV.masked_fill(logp_BTV == -torch.inf, 0.0)
    return -(logp_BTV.exp() * finite_logp_BTV).sum(-1)


def _scale(logits_BTV: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(
            f"temperature must be > 0, got {temperature}: greedy decoding has no ratio"
        )
    logits_BTV = logits_BTV.float()
    return logits_BTV if temperature == 1.0 else logits_BTV / temperature
