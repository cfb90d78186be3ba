import math

import pytest
import torch
from transformers.optimization import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from rlhf_ray.algorithms.schedules import learning_rate_share


@pytest.mark.parametrize(
    ("scheduler", "shares"),
    [
        # Two iterations of warm-up, then p = 0, 1/4, 2/4, 3/4.
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedules_by_hand(scheduler: str, shares: list[float]) -> None:
    found = [learning_rate_share(i, 6, scheduler, 2) for i in range(1, 7)]  # type: ignore[arg-type]
    assert found == pytest.approx(shares)


@pytest.mark.parametrize("num_iterations", [1, 2, 100])
def test_a_constant_rate_is_its_peak_exactly_and_no_rate_is_zero(num_iterations: int) -> None:
    for iteration in range(1, num_iterations + 1):
        assert learning_rate_share(iteration, num_iterations, "constant") == 1
        assert learning_rate_share(iteration, num_iterations, "linear") > 0
        assert learning_rate_share(iteration, num_iterations, "cosine") > 0


def test_schedules_after_the_warm_up_are_those_of_transformers() -> None:
    for scheduler, theirs in (
        ("linear", get_linear_schedule_with_warmup),
        ("cosine", get_cosine_schedule_with_warmup),
    ):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = theirs(optimizer, 3, 20)
        rates = []
        for _ in range(20):
            rates.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        ours = [learning_rate_share(i, 20, scheduler, 3) for i in range(1, 21)]  # type: ignore[arg-type]
        assert ours[3:] == pytest.approx(rates[3:]), scheduler
