"""A training state that does not know how many ranks made it.

Tensors under ``weight/<name>``, ``exp_avg/<name>``, ``exp_avg_sq/<name>`` for every trainable
parameter, fp32 on CPU, and ``num_steps``. Before the first step there are no moments.
"""

from collections.abc import Callable, Mapping

import torch
from torch import nn

from rlhf_ray.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def adam_state(
    trainable: Mapping[str, nn.Parameter],
    *,
    weight: Callable[[nn.Parameter], torch.Tensor],
    moment: Callable[[nn.Parameter, str], torch.Tensor | None],
    num_steps: int,
) -> dict[str, torch.Tensor]:
    """Collect the state through an engine's accessors."""
    state = {"num_steps": torch.tensor(num_steps)}
    for name, param in trainable.items():
        state[f"weight/{name}"] = _copy(weight(param), param)
        for key in MOMENTS if num_steps else ():
            value = moment(param, key)
            assert value is not None, f"{name} has no {key} after {num_steps} steps"
            state[f"{key}/{name}"] = _copy(value, param)
    return state


def load_adam_state(
    trainable: Mapping[str, nn.Parameter],
    state: Mapping[str, torch.Tensor],
    *,
    set_weight: Callable[[nn.Parameter, torch.Tensor], object],
    set_moments: Callable[[nn.Parameter, Mapping[str, torch.Tensor], int], object],
) -> None:
    """Put a state back through an engine's setters.

    Raises:
        CheckpointError: the state is of other parameters.
    """
    saved = {name.removeprefix("weight/") for name in state if name.startswith("weight/")}
    if saved != set(trainable):
        odd = sorted(saved ^ set(trainable))
        raise CheckpointError(
            f"The saved learner has other trainable parameters: {len(odd)} differ, for example "
            f"{odd[0]}; model and LoRA shape must be those of the run"
        )
    num_steps = int(state["num_steps"])
    for name, param in trainable.items():
        set_weight(param, state[f"weight/{name}"])
        if num_steps:
            set_moments(param, {key: state[f"{key}/{name}"] for key in MOMENTS}, num_steps)


def _copy(value: torch.Tensor, param: nn.Parameter) -> torch.Tensor:
    shape = getattr(param, "ds_shape", param.shape)
    return value.detach().float().cpu().reshape(shape).clone()
