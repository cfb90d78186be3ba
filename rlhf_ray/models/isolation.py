"""Keep the texts of a packed block from attending to each other, whatever the architecture.

Most transformers models mask by the positions of a block: one that does not follow its predecessor
begins a new text. Some ignore them (OPT, Falcon, gpt-oss), and some carry a state from token to
token that no attention mask cuts (Mamba, LFM2). No config says which, and none of them raises an
error, so every model is probed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.adapters import unwrapped
from rlhf_ray.models.probes import evaluating

PROBE_TOKENS = 8
"""Length of the probe's first text, and tokens at each end of the second that are compared."""
LEAK = 0.01
"""Change of a text's logits, as a share of their spread, that rounding does not explain in fp32."""
LEAK_OF_ROUNDED = 0.1
"""The same for half precision and quantised weights; a leak changes them by about their spread."""


def isolate_texts(model: nn.Module, block_size: int, key: str) -> None:
    """Make a model compute each text of a block as if it stood alone.

    Where positions are not enough, forward passes without an attention mask get one of their texts
    (for models with several kinds of layers, one for each kind).

    Args:
        model: causal LM on the device where it is trained, in a PEFT wrapper or not.
        block_size: tokens of a block. The probe is as long, because windows of attention count.
        key: config key of the packing, for the message.

    Raises:
        ConfigError: the texts leak into each other in either way.
    """
    leak = _leak(model, block_size)
    if leak is None:
        return
    hook = model.register_forward_pre_hook(_add_mask, with_kwargs=True)
    try:
        is_isolated = _leak(model, block_size) is None
    except (ValueError, RuntimeError, IndexError, TypeError, AttributeError):  # no such mask
        is_isolated = False
    if not is_isolated:
        hook.remove()
        raise ConfigError(
            f"{key} isolate: {type(unwrapped(model)).__name__} cannot keep the texts of a block "
            f"apart: a text's logits change by {leak:.2g} times their spread if another text "
            f"precedes it. Set {key}=none, which trains on one text a row"
        )


@torch.no_grad()
def _leak(model: nn.Module, block_size: int) -> float | None:
    """Return by how much a text's logits depend on what precedes it; None: not at all."""
    base: Any = unwrapped(model)
    table: Tensor = base.get_input_embeddings().weight  # empty where it is divided (ZeRO-3)
    num_tokens = base.config.get_text_config().vocab_size
    ids_1S = torch.randint(num_tokens, (1, block_size), generator=torch.Generator().manual_seed(0))
    first = min(PROBE_TOKENS, block_size // 2)
    positions_S = torch.cat([torch.arange(first), torch.arange(block_size - first)])
    ids_1S, positions_1S = ids_1S.to(table.device), positions_S[None].to(table.device)
    # Of the others, the fp32 logits of a long block would fill the memory of a training.
    num = min(PROBE_TOKENS, block_size - first)
    compared = [*range(num), *range(-num, 0)]
    with evaluating(model):
        packed_SV, alone_SV = (
            model(
                input_ids=ids_1S[:, start:], position_ids=positions_1S[:, start:], use_cache=False
            )
            .logits[0, first - start :][compared]
            .float()
            for start in (0, first)
        )
    changes_S = (packed_SV - alone_SV).square().mean(-1).sqrt() / alone_SV.std(-1).mean()
    ends = changes_S[:num].mean(), changes_S[num:].mean()
    is_half = base.dtype != torch.float32 or torch.is_autocast_enabled(table.device.type)
    rounded = is_half or getattr(base, "is_quantized", False)
    leak = float(max(ends))
    return None if leak <= (LEAK_OF_ROUNDED if rounded else LEAK) else leak


def _add_mask(
    model: nn.Module, inputs: tuple[object, ...], keywords: dict[str, Any]
) -> tuple[tuple[object, ...], dict[str, Any]]:
    if keywords.get("attention_mask") is not None or keywords.get("position_ids") is None:
        return inputs, keywords
    base: Any = unwrapped(model)
    positions_BS = keywords["position_ids"]
    mask = create_masks_for_generate(
        base.config,
        torch.empty(*positions_BS.shape, 0, dtype=base.dtype, device=positions_BS.device),
        attention_mask=None,
        past_key_values=None,
        position_ids=positions_BS,
    )
    return inputs, keywords | {"attention_mask": mask}
