"""Log-probabilities and entropy of a language model's next-token distribution."""

import torch
from torch import Tensor


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability, in nats, of each token under softmax(logits / temperature).

    Position t of both arguments belongs together: align them first (`experience.response_logits`).

        log p(x) = z_x - logsumexp(z),  z = logits / temperature

    A log-softmax would hold a second tensor of the size of the logits, which is the largest
    tensor of a training step.

    Args:
        logits_BTV: logits over the vocabulary V, any floating dtype.
        tokens_BT: token ids in [0, V); padding needs a valid id too.
        temperature: > 0; the one that the tokens were sampled with.

    Returns:
        fp32 `_BT`, differentiable in the logits.

    Raises:
        ValueError: temperature not > 0.
    """
    scaled_BTV = _scale(logits_BTV, temperature)
    chosen_BT = scaled_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)
    return chosen_BT - torch.logsumexp(scaled_BTV, dim=-1)


def entropy(logits_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy H = -sum_v p_v log p_v of softmax(logits / temperature), in nats, fp32 `_BT`.

    Tokens with a logit of -inf have probability 0 and add nothing.

    Raises:
        ValueError: temperature not > 0.
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
