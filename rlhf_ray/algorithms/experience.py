"""A batch ready to learn from, and the alignment between sequences and responses."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Experience:
    """Rollouts with all that was computed on them; one row per sample.

    Names end in their dimensions: B samples, S whole-sequence positions, T response tokens. Row b
    of a `_BT` tensor starts at the first response token, which lies at `prompt_lengths_B[b]` of
    row b of the `_BS` tensors. All rows are right-padded; log-probs are nats, fp32, of the
    temperature-scaled distribution.
    """

    sequences_BS: Tensor
    """Token ids, int64: prompt, then response, left-aligned."""
    attention_BS: Tensor
    """1 on prompt and response, 0 on padding."""
    prompt_lengths_B: Tensor
    """Number of prompt tokens, int64, at least 1."""
    responses_BT: Tensor
    """Token ids of the response alone, int64."""
    mask_BT: Tensor
    """1 on the response tokens that count: those that were sampled."""
    rollout_logprobs_BT: Tensor
    """By the engine that sampled."""
    old_logprobs_BT: Tensor
    """By the learner before the update: the denominator of the ratio."""
    ref_logprobs_BT: Tensor
    """By the frozen reference."""
    values_BT: Tensor
    """Critic's expected return before each token, score units; zeros without a critic."""
    advantages_BT: Tensor
    """What the policy loss multiplies; whitened or not, as the estimator asks."""
    returns_BT: Tensor
    """Targets of the critic, score units; zeros without a critic."""

    @property
    def num_tokens(self) -> int:
        """Response tokens that count."""
        return int(self.mask_BT.bool().sum())

    def rows(self, index: Tensor | slice) -> "Experience":
        """The rows that `index` (a slice, or an int64 or bool tensor) selects, in its order.

        Columns that are padding in all of them go, for `_BS` and `_BT` apart; one stays at least.
        """
        widths = {
            "BS": _width(self.attention_BS[index]),
            "BT": _width(self.mask_BT[index]),
        }
        selected: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            rows = getattr(self, field.name)[index]
            width = widths.get(field.name.rsplit("_", 1)[1])
            selected[field.name] = rows if width is None else rows[:, :width]
        return Experience(**selected)


def pad(rows: Sequence["np.ndarray | Tensor"], fill: float = 0) -> tuple[Tensor, Tensor]:
    """Stacks 1-D rows of different lengths, padding on the right.

    Args:
        rows: at least one, all integer or (if any row that is not empty is floating) floats;
            numpy arrays may be read-only.
        fill: what padding holds.

    Returns:
        `(tensor_BT, mask_BT)`: int64 or fp32, and bool with True on what came from `rows`; T is
        the longest row.

    Raises:
        ValueError: no rows, or a row that is not 1-D.
    """
    if not rows:
        raise ValueError("pad needs at least one row, got none")
    # torch.tensor copies: a tensor over a read-only array (as object stores hand out) is unsafe.
    tensors = [row if isinstance(row, Tensor) else torch.tensor(row) for row in rows]
    for number, row in enumerate(tensors):
        if row.ndim != 1:
            raise ValueError(f"pad needs 1-D rows, row {number} has shape {tuple(row.shape)}")
    # An empty array is float64 by default and must not turn token ids into floats.
    is_floating = any(
        row.is_floating_point() for row in ([r for r in tensors if len(r)] or tensors)
    )
    device = tensors[0].device
    lengths_B = torch.tensor([len(row) for row in tensors], device=device)
    mask_BT = torch.arange(int(lengths_B.max()), device=device) < lengths_B.unsqueeze(1)
    dtype = torch.float32 if is_floating else torch.int64
    tensor_BT = torch.full(mask_BT.shape, fill, dtype=dtype, device=device)
    tensor_BT[mask_BT] = torch.cat([row.to(dtype) for row in tensors])
    return tensor_BT, mask_BT


def response_logits(
    logits_BSV: Tensor, prompt_lengths_B: Tensor, num_response_tokens: int
) -> Tensor:
    """The logits that predict each response token, for sequences that start at position 0.

    Position s predicts token s + 1, so response token t of row b, which lies at
    prompt_lengths_B[b] + t, is predicted at prompt_lengths_B[b] - 1 + t. Positions past the end
    (padding) repeat the last one. What follows S in the shape is free: hidden states or a
    critic's `values_BS` are aligned the same way.

    Args:
        logits_BSV: outputs of the model at each position of the sequences.
        prompt_lengths_B: number of prompt tokens, at least 1.
        num_response_tokens: T.

    Returns:
        `_BTV`, dtype of the logits, differentiable in them.

    Raises:
        ValueError: an empty prompt, whose first response token nothing predicts.
    """
    if bool((prompt_lengths_B < 1).any()):
        rows = (prompt_lengths_B < 1).nonzero().flatten().tolist()
        raise ValueError(f"every prompt needs at least one token, rows {rows} have none")
    steps_T = torch.arange(num_response_tokens, device=logits_BSV.device)
    positions_BT = prompt_lengths_B.unsqueeze(1) - 1 + steps_T
    rows_B1 = torch.arange(len(logits_BSV), device=logits_BSV.device).unsqueeze(1)
    return logits_BSV[rows_B1, positions_BT.clamp(max=logits_BSV.shape[1] - 1)]


def _width(mask: Tensor) -> int:
    """One more than the last column in which any row is real; at least 1."""
    columns = mask.bool().any(dim=0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 1
