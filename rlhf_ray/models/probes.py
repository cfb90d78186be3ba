"""Probe a model, and compare what was merged or saved with what it came from.

A library that leaves weights out, names them otherwise or adds to a tensor that two layers share
says nothing: only the outputs show it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.errors import DataError

PROBE_SHAPE = (8, 4)
"""Texts and tokens of the probe."""
TOLERANCES = {torch.float32: 0.001, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Largest change of the probe's logits, as a share of their size, that rounding explains."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode; restore each one's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def probe_logits(model: nn.Module) -> Tensor:
    """Return the logits of the same tokens each time (a classifier's: of each text), fp32, CPU."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    table: Tensor = embedding.weight
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(len(table), PROBE_SHAPE, generator=generator).to(table.device)
    with evaluating(model):
        logits = model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS)).logits
    return logits.float().cpu()


def refuse_change(before: Tensor, after: Tensor, dtype: torch.dtype, what: str) -> None:
    """Refuse a model whose `probe_logits` are not those that it should have.

    What all logits of a token have in common means nothing and is left out. A classifier's only
    score is compared as it is: it may hardly differ between texts, and is rounded by its size.

    Args:
        before: logits of the model that it came from.
        after: its own.
        dtype: data type of its weights.
        what: the beginning of the message.

    Raises:
        DataError: they differ by more than the data type's rounding.
    """
    if before.shape[-1] > 1:
        before, after = (logits - logits.mean(-1, keepdim=True) for logits in (before, after))
    size, tolerance = float(before.square().mean().sqrt()), TOLERANCES.get(dtype, 0.1)
    # The median of the tokens: rounding alone can send one of them to other experts.
    change = float((after - before).square().mean(-1).sqrt().median())
    if not change <= tolerance * size + 1e-6:
        raise DataError(
            f"{what}: its logits differ by {change:.3g}, of a size of {size:.3g}; rounding to "
            f"{str(dtype).removeprefix('torch.')} explains {tolerance:g} of that"
        )
