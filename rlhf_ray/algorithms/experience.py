"""The assembly of a batch: from the roles' results to micro-batches for the learners.

`Assembler` turns collected rows into an `Experience`; `pad` and `response_logits` hold the
alignment between sequences and responses; `micro_batches` cuts a batch.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf_ray.algorithms.advantages import Estimator, resolve
from rlhf_ray.algorithms.kl import KLKind, kl_estimate
from rlhf_ray.algorithms.rewards import ScorePosition, score_position, token_rewards
from rlhf_ray.algorithms.whitening import zero_padding
from rlhf_ray.config.ppo import PpoConfig

if TYPE_CHECKING:
    import numpy as np

    Rows = Sequence[np.ndarray]


SMALLEST_NATS = 4.0
"""Size to which the rounding of two log-probs of a token is relative at least. They are differences
of logits, which reach 16 to 32 where both are near 0: in fp32, 4e-6 apart by rounding."""


@dataclass(frozen=True)
class Experience:
    """Rollouts with everything computed on them; one row per sample.

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
    """Log-probs of the engine that sampled."""
    old_logprobs_BT: Tensor
    """Log-probs of the learner before the update: the denominator of the ratio."""
    ref_logprobs_BT: Tensor
    """Log-probs of the frozen reference."""
    values_BT: Tensor
    """Critic's expected return before each token, score units; zeros without a critic."""
    advantages_BT: Tensor
    """Factors of the policy loss; whitened or not, as estimator and config require."""
    returns_BT: Tensor
    """Targets of the critic, score units; zeros without a critic."""

    @property
    def num_tokens(self) -> int:
        """Number of response tokens that count."""
        return int(self.mask_BT.bool().sum())

    def rows(self, index: Tensor | slice) -> Self:
        """Return the rows that `index` (a slice, or an int64 or bool tensor) selects, in its order.

        Trailing columns that are padding in all of these rows are cut, separately for `_BS` and
        `_BT`; at least one column stays.
        """
        widths = {"BS": _width(self.attention_BS[index]), "BT": _width(self.mask_BT[index])}
        selected: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            rows = getattr(self, field.name)[index]
            width = widths.get(field.name.rsplit("_", 1)[1])
            selected[field.name] = rows if width is None else rows[:, :width]
        return type(self)(**selected)

    def to(self, device: torch.device) -> Self:
        """Return a copy on a device."""
        names = [field.name for field in dataclasses.fields(self)]
        return type(self)(**{name: getattr(self, name).to(device) for name in names})


def pad(rows: Sequence["np.ndarray | Tensor"], fill: float = 0) -> tuple[Tensor, Tensor]:
    """Stack 1-D rows of different lengths, padded on the right.

    Args:
        rows: at least one; if any row that is not empty is floating, the result is. Numpy arrays
            may be read-only.
        fill: value of the padding.

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
    """Return the logits that predict each response token, for sequences that start at position 0.

    Position s predicts token s + 1, so response token t of row b, which lies at
    prompt_lengths_B[b] + t, is predicted at prompt_lengths_B[b] - 1 + t. Positions past the end
    (padding) repeat the last one. Any dimensions may follow S: hidden states or a critic's
    `values_BS` are aligned the same way.

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
        rows = [int(row) for row in (prompt_lengths_B < 1).nonzero().flatten()]
        raise ValueError(f"every prompt needs at least one token, rows {rows} have none")
    steps_T = torch.arange(num_response_tokens, device=logits_BSV.device)
    positions_BT = prompt_lengths_B.unsqueeze(1) - 1 + steps_T
    rows_B1 = torch.arange(len(logits_BSV), device=logits_BSV.device).unsqueeze(1)
    return logits_BSV[rows_B1, positions_BT.clamp(max=logits_BSV.shape[1] - 1)]


def _width(mask: Tensor) -> int:
    """Return one more than the index of the last column with a real token; at least 1."""
    columns = mask.bool().any(dim=0).nonzero()
    return int(columns[-1]) + 1 if len(columns) else 1


@dataclass(frozen=True)
class Collected:
    """The roles' results for a batch, one row per response."""

    sequences: "Rows"
    """[S] token ids of each prompt and its response."""
    prompt_lengths: Sequence[int]
    """Number of prompt tokens of each row."""
    responses: "Rows"
    """[T] token ids of each response."""
    rollout_logprobs: "Rows"
    """[T] log-probs of the engine."""
    old_logprobs: "Rows"
    """[T] log-probs of the learner."""
    ref_logprobs: "Rows"
    """[T] log-probs of the reference."""
    values: "Rows | None"
    """[T] values of the critic, with the position `first_pad` or to bootstrap [T + 1]; None without
    one."""
    scores_B: Tensor
    """Score of each response."""
    cut_off: Sequence[bool] = ()
    """Whether each response was cut off at its limit; empty: none was."""


@dataclass(frozen=True)
class Assembled:
    """A batch with token rewards and advantages, in the order of its rows."""

    experience: Experience
    """The batch, its advantages not whitened yet; values and returns are zero without a critic."""
    rewards_BT: Tensor
    """Reward of each token, its score included, also where a value replaces that in the
    advantages; with `first_pad` the score may stand one after the last token."""
    value_mask_BT: Tensor
    """Where the critic learns: on the mask, and where a score stands after the last token."""
    cut_off_B: Tensor
    """Whether each response was cut off at its limit."""


@dataclass(frozen=True)
class Assembler:
    """Makes token rewards and advantages by the options of `ppo`."""

    estimator: Estimator
    gamma: float
    lam: float
    group_size: int
    """Number of responses per prompt."""
    kl_kind: KLKind
    kl_in: Literal["reward", "loss"]
    """reward: the KL penalty is part of the token rewards; loss: it is a term of the loss."""
    position: ScorePosition
    max_tokens: int
    """Length limit of responses: after one of this length no position is left for the score."""
    bootstraps: bool = False
    """Whether the value of the state behind a response that was cut off replaces its score."""

    @classmethod
    def of(cls, ppo: PpoConfig, max_tokens: int) -> Self:
        """Return the assembler that makes advantages as the config says.

        Raises:
            ConfigError: the function named in ppo.advantage cannot be imported or used.
        """
        return cls(
            estimator=resolve(ppo.advantage),
            gamma=ppo.gamma,
            lam=ppo.gae_lambda,
            group_size=ppo.samples_per_prompt,
            kl_kind=ppo.kl_estimator,
            kl_in=ppo.kl_in,
            position=ppo.score_position,
            max_tokens=max_tokens,
            bootstraps=ppo.overlong.truncated == "bootstrap",
        )

    def __call__(self, batch: Collected, kl_coef: float) -> Assembled:
        """Compute token rewards and advantages of a whole batch.

        Args:
            batch: the rows; those of one prompt must be next to each other.
            kl_coef: weight of the KL penalty, score units per nat.
        """
        sequences_BS, attention_BS = pad(batch.sequences)
        responses_BT, mask_BT = pad(batch.responses)
        width = self._width(mask_BT.shape[1])
        responses_BT, mask_BT = _fit(responses_BT, width), _fit(mask_BT, width)
        rows = (batch.rollout_logprobs, batch.old_logprobs, batch.ref_logprobs)
        engine_BT, old_BT, ref_BT = (_fit(pad(part)[0], width) for part in rows)
        values_BT = torch.zeros_like(old_BT)
        if batch.values is not None:
            values_BT = _fit(pad(batch.values)[0], width)
        value_mask_BT = mask_BT | score_position(mask_BT, self.position)
        kl_BT = kl_estimate(old_BT, ref_BT, self.kl_kind)
        penalty = kl_coef if self.kl_in == "reward" else 0.0
        rewards_BT = token_rewards(batch.scores_B, kl_BT, mask_BT, penalty, self.position)
        cut_off_B = torch.tensor(batch.cut_off or [False] * len(batch.scores_B))
        scores_B, learnt_BT = batch.scores_B, rewards_BT
        if self.bootstraps and batch.values is not None:
            behind_B = torch.tensor([float(row[-1]) for row in batch.values])
            scores_B = torch.where(cut_off_B, self.gamma * behind_B, scores_B)
            learnt_BT = token_rewards(scores_B, kl_BT, mask_BT, penalty, self.position)
        # Where policy and reference agree, their KL is the rounding of their log-probs.
        nats_BT = (old_BT.abs() + ref_BT.abs()).clamp(min=SMALLEST_NATS)
        nats_B = zero_padding(nats_BT, mask_BT).sum(1)
        sizes_B = scores_B.abs() + penalty * nats_B
        advantages_BT = self._advantages(learnt_BT, value_mask_BT, values_BT, sizes_B)
        has_critic = self.estimator.needs_critic
        returns_BT = advantages_BT + values_BT if has_critic else torch.zeros_like(values_BT)
        experience = Experience(
            sequences_BS=sequences_BS,
            attention_BS=attention_BS,
            prompt_lengths_B=torch.tensor(batch.prompt_lengths),
            responses_BT=responses_BT,
            mask_BT=mask_BT,
            rollout_logprobs_BT=engine_BT,
            old_logprobs_BT=old_BT,
            ref_logprobs_BT=ref_BT,
            values_BT=values_BT,
            advantages_BT=zero_padding(advantages_BT, mask_BT),
            returns_BT=zero_padding(returns_BT, value_mask_BT),
        )
        return Assembled(experience, rewards_BT, value_mask_BT, cut_off_B)

    def _advantages(
        self, rewards_BT: Tensor, mask_BT: Tensor, values_BT: Tensor, sizes_B: Tensor
    ) -> Tensor:
        return self.estimator(
            rewards_BT,
            mask_BT,
            values_BT=values_BT,
            group_size=self.group_size,
            sizes_B=sizes_B,
            gamma=self.gamma,
            lam=self.lam,
        )

    def _width(self, longest: int) -> int:
        room_behind = self.position == "first_pad" and longest < self.max_tokens
        return longest + 1 if room_behind else longest


def _fit(rows_BT: Tensor, width: int) -> Tensor:
    return F.pad(rows_BT, (0, width - rows_BT.shape[1]))  # negative padding cuts columns
