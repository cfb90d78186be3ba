"""Scalar heads: a value for every token (critic), a score for every sequence (reward model).

Sequences are padded on the right. Dimensions: B sequences, S tokens of a sequence.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import DataError

HEAD_NAMES = ("score.", "classifier.")
"""How the weights of a sequence-classification head begin, in decoders and in encoders."""


def has_token_head(model: Any) -> bool:
    """Whether the head is one linear layer that applies to single tokens, as decoders have it."""
    return hasattr(_unwrapped(model), "score")


def backbone_and_head(model: Any) -> tuple[nn.Module, Any]:
    """The transformer and the linear head of a sequence-classification model.

    Works through a PEFT wrapper: LoRA layers are part of the backbone, and the head is the
    trained copy where one exists.

    Raises:
        DataError: the model has no head that applies to single tokens.
    """
    base = _unwrapped(model)
    if not has_token_head(base):
        raise DataError(
            f"{type(base).__name__} has no linear head `score` over tokens; what is trained needs "
            "a decoder with a sequence-classification head, such as LlamaForSequenceClassification"
        )
    return getattr(base, base.base_model_prefix), base.score


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def token_values(model: Any, input_ids_BS: Tensor, attention_BS: Tensor) -> Tensor:
    """The head's output at every token, `_BS`, fp32; what stands at padding means nothing.

    Args:
        model: (PEFT-wrapped) sequence-classification model with one label.
        input_ids_BS: token ids, padded on the right.
        attention_BS: 1 on real tokens.
    """
    backbone, head = backbone_and_head(model)
    hidden_BSD = backbone(
        input_ids=input_ids_BS,
        attention_mask=attention_BS,
        position_ids=position_ids(attention_BS),
        use_cache=False,
    ).last_hidden_state
    return head(hidden_BSD).squeeze(-1).float()


def sequence_scores(model: Any, input_ids_BS: Tensor, attention_BS: Tensor) -> Tensor:
    """The value at the last real token of each sequence, `_B`, fp32; an encoder's score.

    Arguments: `token_values`.
    """
    if not has_token_head(model):
        logits_B1 = model(input_ids=input_ids_BS, attention_mask=attention_BS).logits
        return logits_B1.squeeze(-1).float()
    values_BS = token_values(model, input_ids_BS, attention_BS)
    last_B1 = attention_BS.long().sum(dim=1, keepdim=True) - 1
    return values_BS.gather(1, last_B1).squeeze(1)


def position_ids(attention_BS: Tensor) -> Tensor:
    """Positions that count real tokens alone: 0, 1, 2, ...; `_BS`."""
    return (attention_BS.long().cumsum(dim=1) - 1).clamp(min=0)


class ValueModel(nn.Module):
    """A sequence-classification model whose forward pass gives `token_values`."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Values of every token, `_BS`."""
        return token_values(self.classifier, input_ids, attention_mask)


def initialise_head(model: Any, seed: int | None) -> None:
    """Set the head's weights anew, in place.

    Args:
        seed: of N(0, 1 / sqrt(width + 1)); None: zeros.
    """
    _, head = backbone_and_head(model)
    active = head.modules_to_save["default"] if hasattr(head, "modules_to_save") else head
    weight = active.weight
    with torch.no_grad():
        if seed is None:
            weight.zero_()
        else:
            generator = torch.Generator().manual_seed(seed)
            deviation = 1 / math.sqrt(weight.shape[1] + 1)
            weight.copy_(torch.randn(weight.shape, generator=generator) * deviation)


def keep_head_in_fp32(model: Any) -> None:
    """Compute scores in fp32 over a half-precision base: bf16 scores of close answers tie."""
    _, head = backbone_and_head(model)
    head.float()
    head.register_forward_pre_hook(_to_type_of_weight)


def _to_type_of_weight(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden, *rest = inputs
    return (hidden.to(head.weight.dtype), *rest)  # type: ignore[arg-type]
