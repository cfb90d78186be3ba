"""Two batches whose results are known from independent implementations, run once on CPU."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass(frozen=True)
class Golden:
    """Inputs of one PPO update; the expected results stand in the tests."""

    logprobs_BT: Tensor
    ref_logprobs_BT: Tensor
    mask_BT: Tensor
    scores_B: Tensor
    values_BT: Tensor
    new_logprobs_BT: Tensor
    new_values_BT: Tensor


@pytest.fixture
def golden() -> Golden:
    """Numbers of TRL 0.11.4; gamma 1, lambda .95, KL coefficient .2, both clips .2.

    The last token is padding and holds content that would show.
    """
    logprobs_BT = torch.tensor([[-1.0, -2.0, -0.5, -3.0], [-0.7, -1.2, -0.1, -9.9]])
    values_BT = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, -0.1, -0.2, 5.0]])
    return Golden(
        logprobs_BT=logprobs_BT,
        ref_logprobs_BT=torch.tensor([[-1.1, -1.5, -0.9, -2.5], [-0.7, -1.0, -0.4, -9.9]]),
        mask_BT=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        scores_B=torch.tensor([1.0, -0.5]),
        values_BT=values_BT,
        new_logprobs_BT=logprobs_BT + torch.tensor([[0.3, -0.3, 0.05, 0.0], [-0.1, 0.4, 0.0, 7.0]]),
        new_values_BT=values_BT + torch.tensor([[0.5, -0.1, 0.0, 0.1], [0.05, -0.5, 0.2, 9.0]]),
    )


@pytest.fixture
def second_golden() -> Golden:
    """Numbers of OpenRLHF 0.11.0; gamma 1, lambda .95, KL coefficient .1, clips .2 and .5.

    It clips scores to [-10, 10], so the -12 of its second row is -10 here.
    """
    return Golden(
        logprobs_BT=torch.tensor([[-1.0, -0.5, -2.0], [-0.7, -1.2, 0.0]]),
        ref_logprobs_BT=torch.tensor([[-1.2, -0.4, -1.5], [-0.9, -1.0, 0.0]]),
        mask_BT=torch.tensor([[1, 1, 1], [1, 1, 0]]),
        scores_B=torch.tensor([1.0, -10.0]),
        values_BT=torch.tensor([[0.1, 0.2, 0.3], [-0.1, 0.4, 0.0]]),
        new_logprobs_BT=torch.tensor([[-0.7, -0.6, -1.6], [-1.1, -1.2, 0.0]]),
        new_values_BT=torch.tensor([[0.9, 0.1, 0.3], [-0.4, -0.5, 0.0]]),
    )
