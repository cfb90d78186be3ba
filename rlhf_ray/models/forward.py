"""Forward passes: log-probs and values of rollouts, and the scalar heads that give values.

B sequences, S tokens of prompt and response, T response tokens, V vocabulary. Sequences are
left-aligned and right-padded.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor, nn

from rlhf_ray.algorithms.experience import pad, response_logits
from rlhf_ray.algorithms.logprobs import SamplingRule
from rlhf_ray.algorithms.micro_batches import micro_batches
from rlhf_ray.errors import DataError
from rlhf_ray.models.adapters import unwrapped
from rlhf_ray.models.token_logprobs import chunked_logprobs, position_ids
from rlhf_ray.observability.phases import count
from rlhf_ray.types import Rollout

Forward = Callable[[Tensor, Tensor], Tensor]
"""(sequences_BS, attention_BS) -> an output per position, `_BS` or `_BSV`."""

HEAD_NAMES = ("score.", "classifier.")
"""How the weights of a sequence-classification head begin, in decoders and in encoders."""


def causal_lm_logits(model: nn.Module, last: int = 0) -> Forward:
    """Return a forward pass of a causal LM (in PEFT or DeepSpeed or bare) to logits `_BSV`.

    ``last``: number of positions at the end to compute logits of; 0: all.
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
    model: nn.Module,
    rollouts: Sequence[Rollout],
    *,
    rule: SamplingRule,
    max_tokens: int,
    device: torch.device,
) -> list[np.ndarray]:
    """Return the log-probs of the response tokens: per rollout a [T] fp32 array, no gradient.

    ``model`` must come from `answer_with_logprobs`.
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
    """Return the values of the states before each response token: per rollout a [T] fp32 array.

    ``one_behind``: [T + 1], with the value of the state after the last token.
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
    """Run ``compute`` on padded micro-batches; return unpadded rows in the order of rollouts."""
    sequences = [rollout.sequence_ids for rollout in rollouts]
    results: dict[int, np.ndarray] = {}
    for rows in micro_batches([len(sequence) for sequence in sequences], max_tokens, device):
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
        count(len(rows), "rows computed")
    return [results[row] for row in range(len(rollouts))]


class ValueModel(nn.Module):
    """A sequence-classification model whose forward pass returns `token_values`."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the value of every token, `_BS`."""
        return token_values(self.classifier, input_ids, attention_mask)


def token_values(model: nn.Module, input_ids_BS: Tensor, attention_BS: Tensor) -> Tensor:
    """Return the head's output at every token, `_BS`, fp32; entries at padding are arbitrary."""
    backbone, head = backbone_and_head(model)
    hidden_BSD = backbone(
        input_ids=input_ids_BS,
        attention_mask=attention_BS,
        position_ids=position_ids(attention_BS),
        use_cache=False,
    ).last_hidden_state
    return head(hidden_BSD).squeeze(-1).float()


def sequence_scores(model: nn.Module, input_ids_BS: Tensor, attention_BS: Tensor) -> Tensor:
    """Return the value at the last real token of each sequence, `_B`, fp32.

    An encoder has no values per token; its classification logit is the score.
    Arguments: see `token_values`.
    """
    if not has_token_head(model):
        logits_B1 = model(input_ids=input_ids_BS, attention_mask=attention_BS).logits
        return logits_B1.squeeze(-1).float()
    values_BS = token_values(model, input_ids_BS, attention_BS)
    last_B1 = attention_BS.long().sum(dim=1, keepdim=True) - 1
    return values_BS.gather(1, last_B1).squeeze(1)


def has_token_head(model: nn.Module) -> bool:
    """Return whether the head is one linear layer that applies to single tokens (decoders)."""
    return hasattr(unwrapped(model), "score")


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the transformer and the linear head of a sequence-classification model.

    Works through a PEFT wrapper: LoRA layers are part of the backbone, and the head is the
    trained copy if there is one.

    Raises:
        DataError: the model has no head that applies to single tokens.
    """
    base = unwrapped(model)
    if not has_token_head(base):
        raise DataError(
            f"{type(base).__name__} has no linear head `score` over tokens; what is trained needs "
            "a decoder with a sequence-classification head, such as LlamaForSequenceClassification"
        )
    return getattr(base, str(base.base_model_prefix)), base.get_submodule("score")


def initialise_head(model: nn.Module, seed: int | None) -> None:
    """Draw the head's weights from N(0, 1 / sqrt(width + 1)), in place; without a seed: zeros."""
    _, head = backbone_and_head(model)
    # PEFT keeps the original head beside the copy that it trains and computes with.
    if hasattr(head, "modules_to_save"):
        head = head.get_submodule("modules_to_save.default")
    weight = head.get_parameter("weight")
    with torch.no_grad(), gather_params_ctx([weight]):  # it may be divided (ZeRO-3)
        if seed is None:
            weight.zero_()
        else:
            generator = torch.Generator().manual_seed(seed)
            deviation = 1 / math.sqrt(weight.shape[1] + 1)
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)


def keep_head_in_fp32(model: nn.Module) -> None:
    """Hold the head's weights and compute its output in fp32, whatever the base's data type."""
    names = [name for name, _ in model.named_modules() if f"{name}.".startswith(HEAD_NAMES)]
    for module in map(model.get_submodule, names):
        if type(module) is nn.Linear:
            module.__class__ = Fp32Linear  # keeps its name, its hooks and its place in the model
        module.float()


class Fp32Linear(nn.Linear):
    """A linear layer of a head over a half-precision base: bf16 scores of close answers tie.

    Casting the model leaves its weights in fp32, and it computes in fp32 inside ``autocast``, too.
    """

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        has_autocast = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
            return super().forward(input.float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fp32Linear":
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == torch.float32 else tensor.float().to(result.device)

        return super()._apply(moved, recurse)


def has_fp32_head(model: nn.Module) -> bool:
    """Return whether a part of the model stays in fp32 (`keep_head_in_fp32`)."""
    return any(isinstance(module, Fp32Linear) for module in model.modules())
