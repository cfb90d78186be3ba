"""DeepSpeed ranks in real processes: the same steps as plain PyTorch, at any number of ranks,
with activations kept or recomputed.

Three steps are learnt at one number of ranks, three more from their state at the other number; each
is held against `TorchEngine`, which takes the steps in one process.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from deepspeed_ranks import (
    OPTIMIZER,
    STEPS,
    build,
    build_critic,
    critic_rank_main,
    learn_values,
    rank_main,
    take_steps,
)
from forked_ranks import in_group

from rlhf_ray.engines.torch_engine import TorchEngine

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("nothing_compiled"),
]


def learn(
    world_size: int,
    zero_stage: int,
    recompute: bool = False,
    state: Any = None,
    first: int = 0,
    discarding: bool = False,
) -> tuple[list[float], Any]:
    """Run a group of ranks in processes; gradient norms and state of rank 0."""
    return in_group(rank_main, world_size, zero_stage, recompute, state, first, discarding)


@dataclass(frozen=True)
class Learnt:
    """What was learnt from the beginning: norms of the gradients, and the state."""

    norms: list[float]
    state: dict[str, torch.Tensor]

    def require(self, norms: list[float], state: Any) -> None:
        """Compare with what ranks have learnt."""
        assert norms == pytest.approx(self.norms, rel=1e-4)
        assert set(state) == set(self.state)
        assert int(state["num_steps"]) == len(self.norms)
        for name, value in self.state.items():
            torch.testing.assert_close(
                torch.from_numpy(state[name]), value, rtol=1e-4, atol=2e-5, msg=name
            )


@pytest.fixture(scope="module")
def oracle() -> list[Learnt]:
    """Half of the steps, and all of them."""
    engine, norms, learnt = TorchEngine(build(), **OPTIMIZER), list[float](), list[Learnt]()
    for first in (0, STEPS):
        norms = norms + take_steps(engine, first)
        state = {name: value.clone() for name, value in engine.export_state().items()}
        learnt.append(Learnt(norms, state))
    return learnt


@pytest.mark.parametrize(("ranks", "then_ranks", "zero_stage"), [(2, 1, 2), (1, 2, 3)])
def test_steps_and_state_do_not_depend_on_ranks_or_sharding(
    oracle: list[Learnt], ranks: int, then_ranks: int, zero_stage: int
) -> None:
    """Gradients that are discarded between the steps leave nothing behind."""
    norms, state = learn(ranks, zero_stage, discarding=True)
    oracle[0].require(norms, state)
    then_norms, state = learn(then_ranks, zero_stage, state=state, first=STEPS, discarding=True)
    oracle[1].require(norms + then_norms, state)


def test_gradients_that_are_discarded_leave_nothing_behind_at_stage_1(oracle: list[Learnt]) -> None:
    oracle[0].require(*learn(2, 1, discarding=True))


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_recomputed_activations_change_no_step(oracle: list[Learnt], zero_stage: int) -> None:
    oracle[0].require(*learn(2, zero_stage, recompute=True))


TOLERANCES = {"norms": 0.01, "after": 0.02, "head": 0.001}
"""Of a critic that learns with adapters in half precision, against fp32 adapters."""


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "dtype"),
    [(ranks, stage, "bfloat16") for ranks in (1, 2) for stage in (1, 2, 3)]
    + [(1, 2, "float16"), (2, 3, "float16")],
)
def test_a_half_precision_critic_keeps_its_head_in_fp32_and_learns_as_in_plain_pytorch(
    ranks: int, zero_stage: int, dtype: str
) -> None:
    engine = TorchEngine(build_critic(getattr(torch, dtype)), **OPTIMIZER)
    expected = learn_values(engine)
    dtypes, arrays = in_group(critic_rank_main, ranks, zero_stage, dtype)
    learnt = {name: torch.from_numpy(array) for name, array in arrays.items()}
    assert dtypes == {"torch.float32"}
    # An adapter that has learnt nothing changes nothing, so the head alone makes the difference.
    torch.testing.assert_close(learnt["before"], expected["before"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(learnt["restored"], learnt["after"], rtol=0, atol=0)
    head = next(name for name in learnt if name.startswith("weight/") and "score" in name)
    torch.testing.assert_close(learnt["head"], learnt[head], rtol=0, atol=0)
    for name, tolerance in TOLERANCES.items():
        torch.testing.assert_close(learnt[name], expected[name], rtol=tolerance, atol=tolerance)
