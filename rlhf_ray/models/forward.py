"""Forward passes over rollouts: from ragged rows to log-probs and back to ragged rows.

B rollouts, S tokens of prompt and response, T response tokens, V vocabulary; rows are left-aligned
and right-padded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.algorithms.experience import micro_batches, pad, response_logits
from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.config.rollout import RolloutConfig
from rlhf_ray.models.heads import position_ids
from rlhf_ray.models.token_logprobs import chunked_logprobs
from rlhf_ray.types import Rollout

Forward = Callable[[Tensor, Tensor], Tensor]
"""(sequences_BS, attention_BS) -> something per position, `_BS` or `_BSV`."""


def sampling_rule(rollout: RolloutConfig, stop_token_ids: tuple[int, ...]) -> SamplingRule:
    """How the engines draw tokens, and so what every log-prob of a run is of.

    Args:
        rollout: how responses are sampled.
        stop_token_ids: every id by which the model ends a response (`models.stopping`).
    """
    return SamplingRule(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_tokens=rollout.min_tokens,
        stop_token_ids=() if rollout.ignore_eos else stop_token_ids,
    )


def causal_lm_logits(model: Any, last: int = 0) -> Forward:
    """Forward of a causal LM (wrapped in PEFT or DeepSpeed or not): logits `_BSV`.

    ``last``: only of so many last positions; 0: of all.
    """

    def forward(sequences_BS: Tensor, attention_BS: Tensor) -> Tensor:
        return model(
            input_ids=sequences_BS,
            attention_mask=attention_BS,
            position_ids=position_ids(attention_BS),
            use_cache=False,
            **({"logits_to_keep": last} if last else {}),
        ).logits

    return forward


def response_logprobs(
    model: Any,
    rollouts: Sequence[Rollout],
    *,
    rule: SamplingRule,
    max_tokens: int,
    device: torch.device,
) -> list[np.ndarray]:
    """Log-probs of the response tokens, a [T] fp32 array a rollout, without gradient.

    ``model`` is one that `answer_with_logprobs` taught.
    """

    def logprobs(*batch: Tensor) -> Tensor:
        (logprobs_BT,) = chunked_logprobs(model, *batch, rule=rule)
        return logprobs_BT

    return _by_response(logprobs, rollouts, max_tokens, device)


def response_values(
    forward: Forward,
    rollouts: Sequence[Rollout],
    *,
    one_behind: bool = False,
    max_tokens: int,
    device: torch.device,
) -> list[np.ndarray]:
    """Values of the states in which the response tokens are chosen, a [T] fp32 array a rollout.

    ``one_behind``: [T + 1], with the value of the state behind the last token.
    """

    def values(sequences_BS: Tensor, attention_BS: Tensor, prompts_B: Tensor, tokens_BT: Tensor):
        num_values = tokens_BT.shape[1] + one_behind
        return response_logits(forward(sequences_BS, attention_BS), prompts_B, num_values)

    return _by_response(values, rollouts, max_tokens, device, one_behind)


@torch.no_grad()
def _by_response(
    compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    rollouts: Sequence[Rollout],
    max_tokens: int,
    device: torch.device,
    num_further: int = 0,
) -> list[np.ndarray]:
    sequences = [rollout.sequence_ids for rollout in rollouts]
    results: dict[int, np.ndarray] = {}
    for rows in micro_batches([len(sequence) for sequence in sequences], max_tokens):
        sequences_BS, attention_BS = pad([sequences[row] for row in rows])
        tokens_BT, _ = pad([rollouts[row].response_ids for row in rows])
        prompts_B = torch.tensor([len(rollouts[row].prompt.token_ids) for row in rows])
        result_BT = compute(
            sequences_BS.to(device),
            attention_BS.to(device),
            prompts_B.to(device),
            tokens_BT.to(device),
        )
        for row, values in zip(rows, result_BT.float().cpu().numpy(), strict=True):
            results[row] = values[: len(rollouts[row].response_ids) + num_further].copy()
    return [results[row] for row in range(len(rollouts))]
