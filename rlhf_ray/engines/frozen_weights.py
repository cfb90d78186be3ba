"""Weights that are not trained, on their way between a GPU and main memory."""

import torch
from torch import nn


def move_frozen(module: nn.Module, device: torch.device) -> None:
    """Move what is not trained to a device, and give the GPU's unused memory back.

    With an adapter that is nearly everything. What is trained stays: optimizers hold views of it.
    """
    for param in module.parameters():
        if not param.requires_grad:
            param.data = param.data.to(device)
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
